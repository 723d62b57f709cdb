"""The number of workers changes the time a pack takes, and nothing else."""

import pytest
from test_pack import all_files, make_source

from softmoe_clip.data_pipelines import pack_workers
from softmoe_clip.data_pipelines.pack import pack


def test_threads_write_the_same_bytes(tmp_path):
    source = make_source(tmp_path / "source", 30)
    for workers in (1, 3):
        pack(source, tmp_path / str(workers), shard_size=7, num_workers=workers)
    assert all_files(tmp_path / "1") == all_files(tmp_path / "3")


@pytest.mark.slow
def test_processes_write_the_same_bytes_and_report_every_picture(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source", 60)
    (source / "5.png").write_bytes(b"no picture")
    pack(source, tmp_path / "1", shard_size=10, num_workers=1)
    monkeypatch.setattr(pack_workers, "PICTURES_WORTH_A_PROCESS", 1)
    for workers in (2, 3, 16):
        report = pack(source, tmp_path / str(workers), shard_size=10, num_workers=workers)
        assert all_files(tmp_path / str(workers)) == all_files(tmp_path / "1")
        assert [entry["name"] for entry in report.skipped] == ["5.png"]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_one_sentence_and_finished_shards_stay(tmp_path, monkeypatch):
    import multiprocessing
    import threading
    import time

    source = make_source(tmp_path / "source", 600)
    monkeypatch.setattr(pack_workers, "PICTURES_WORTH_A_PROCESS", 1)

    def kill_one():
        while not list(tmp_path.glob("out.partial/finished/*.json")):
            time.sleep(0.005)
        multiprocessing.active_children()[0].kill()

    threading.Thread(target=kill_one).start()
    with pytest.raises(ValueError, match="a process that packs was stopped from outside"):
        pack(source, tmp_path / "out", "train", shard_size=10, num_workers=2)
    assert multiprocessing.active_children() == []
    assert list(tmp_path.glob("out.partial/finished/*.json"))
    pack(source, tmp_path / "out", "train", shard_size=10, num_workers=1)
    pack(source, tmp_path / "whole", "train", shard_size=10, num_workers=1)
    assert all_files(tmp_path / "out") == all_files(tmp_path / "whole")


def test_no_workers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="workers is 0"):
        pack(make_source(tmp_path / "source", 3), tmp_path / "out", num_workers=0)
