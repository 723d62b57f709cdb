"""Output folders and files appear whole or not at all."""

import os
import resource
import subprocess
import sys

import pytest

from softmoe_clip.data_pipelines.new_folder import new_folder, write_whole


def test_the_folder_appears_at_the_end_and_not_before(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "a").write_text("a")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["a"]
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path, error):
    def write():
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("a")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_there_but_nothing_else(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("a")
    with pytest.raises(ValueError, match="empty exists and is not empty"), new_folder(tmp_path / "empty"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file"), new_folder(tmp_path / "file/below/it"):
        pass
    with pytest.raises(ValueError, match="file is a file"), new_folder(tmp_path / "file"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        with pytest.raises(ValueError, match="another process is writing"), new_folder(tmp_path / "out"):
            pass
        assert (folder / "a").exists()
    assert os.listdir(tmp_path / "out") == ["a"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    code = (
        "import os, sys\n"
        "from softmoe_clip.data_pipelines.new_folder import new_folder\n"
        "with new_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'old').mkdir()\n"
        "    (folder / 'old' / 'a').write_text('a')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert result.returncode == -9
    assert os.listdir(tmp_path) == [".out.partial"]
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("a")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["new"]


def test_a_file_for_which_the_disk_has_no_room_is_named_and_leaves_the_older_one(tmp_path):
    file = tmp_path / "numbers.json"
    write_whole(file, "older")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^no space left while writing .*numbers.json \(File too large\): free some"):
            write_whole(file, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("numbers.json", "older")]
