"""Runs at URLs: mirrored whole or not at all, gone on with on another machine to the same bits, never lost."""

import json

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from softmoe_clip.training import remote_run
from softmoe_clip.training.checkpoint import folder_name
from softmoe_clip.training.checksums import write_checksums
from softmoe_clip.training.loop import train
from softmoe_clip.training.remote_run import Mirror, cached_under, run_at

SPEED = ("pairs_per_second", "seconds")  # what a second run need not repeat
WEIGHTS = "model/open_clip_model.safetensors"


class Faulty(MemoryFileSystem):
    """A store in this process's memory that breaks where the test says so."""

    protocol = "faulty"
    store, pseudo_dirs = {}, [""]
    breaks_at = "no file"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("faulty://", "memory://"))

    def put_file(self, file, target, *arguments, **settings):
        if Faulty.breaks_at in target:
            raise ConnectionError("the line is dead")
        super().put_file(file, target, *arguments, **settings)


fsspec.register_implementation("faulty", Faulty, clobber=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Empty stores, no pauses between tries, and a cache of the test's own."""
    for store in (MemoryFileSystem, Faulty):
        monkeypatch.setattr(store, "store", {})
        monkeypatch.setattr(store, "pseudo_dirs", [""])
    monkeypatch.setattr(Faulty, "breaks_at", "no file")
    monkeypatch.setattr(remote_run, "FIRST_PAUSE", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def machine(tiny_config, tmp_path):
    """Make the config of the run at a URL on a machine of some name, which has its own folder to work in."""

    def make(name, url="faulty://bucket/run", *overrides):
        return tiny_config(f"out={url}", f"working_folder={tmp_path / name}", *overrides)

    return make


def add_checkpoint(folder, step):
    """Leave what a run leaves after a step, as far as a mirror is concerned."""
    checkpoint = folder / "checkpoints" / folder_name(step)
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.safetensors", "progress.json"):
        (checkpoint / name).write_text(f"{name} after step {step}")
    write_checksums(checkpoint)
    (folder / "metrics.jsonl").write_text(f"up to step {step}")
    (folder / "model").mkdir(exist_ok=True)
    (folder / WEIGHTS).write_text(f"after step {step}")


def begun_run(config, *steps, begun="today"):
    """Begin a run on a machine, and upload it after each of these steps."""
    mirror = Mirror(config)
    mirror.folder.mkdir(parents=True, exist_ok=True)
    (mirror.folder / "versions.json").write_text(json.dumps({"begun": begun}))
    mirror.upload()
    for step in steps:
        add_checkpoint(mirror.folder, step)
        mirror.upload(step)
    return mirror


def shown(folder, folder_bytes):
    """All files of a run but its checkpoints and TensorBoard's, with the numbers of its log."""
    files = {name: data for name, data in folder_bytes(folder).items() if name.split("/")[0] in ("model", "eval")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return files, [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


@pytest.mark.parametrize("url", ["file://{}/bucket/run", "memory://bucket/run"])
def test_a_run_at_a_url_goes_on_on_another_machine_to_the_same_bits(machine, tiny_config, tmp_path, folder_bytes, url):
    url, constant = url.format(tmp_path), "optim.schedule=constant"
    first = train(machine("a", url, constant, "steps=3"))
    assert first == tmp_path / "a"
    second = train(machine("b", url, constant))
    whole = train(tiny_config(constant))
    assert shown(second, folder_bytes) == shown(whole, folder_bytes)
    system, root = fsspec.core.url_to_fs(url)
    there = DirFileSystem(path=root, fs=system)
    there_files = {name.lstrip("/") for name in there.find("")}
    kept_locally = {name for name in folder_bytes(second) if not name.startswith("tensorboard")}
    assert {name for name in there_files if not name.startswith("tensorboard")} == kept_locally
    assert all(there.cat_file(name) == (second / name).read_bytes() for name in kept_locally)
    assert sum(name.startswith("tensorboard") for name in there_files) == 2  # one file of each machine


@pytest.mark.parametrize("ema", ["ema=null", "ema={decay: 0.5}"])
def test_a_finished_run_at_a_url_is_finished_everywhere(machine, capsys, ema):
    train(machine("a", "faulty://bucket/run", "steps=2", ema))
    capsys.readouterr()
    train(machine("b", "faulty://bucket/run", "steps=2", ema))
    assert "faulty://bucket/run is finished (2 steps); nothing to do" in capsys.readouterr().err


def test_a_store_that_fails_stops_the_run_in_one_sentence_and_nothing_is_lost(
    machine, tiny_config, tmp_path, capsys, monkeypatch, folder_bytes
):
    monkeypatch.setattr(Faulty, "breaks_at", "step_00000004/optimizer")
    told = rf"reached in 4 tries \(the line is dead\): what is not there yet is in {tmp_path}/a; start the same command"
    with pytest.raises(OSError, match=told):
        train(machine("a"))
    assert sorted(path.name for path in (tmp_path / "a/checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    assert Mirror(machine("a")).whole_steps() == [2]
    monkeypatch.setattr(Faulty, "breaks_at", "no file")
    as_it_was, whole = dict(Faulty.store), train(tiny_config())
    for name, step in (("a", 4), ("b", 2)):
        monkeypatch.setattr(Faulty, "store", dict(as_it_was))
        capsys.readouterr()
        run = train(machine(name))
        assert f"going on after step {step} of 6" in capsys.readouterr().err
        assert shown(run, folder_bytes) == shown(whole, folder_bytes)


def test_what_a_failed_upload_left_is_uploaded_by_the_next_start(machine, monkeypatch):
    mirror = begun_run(machine("a"), 2)
    add_checkpoint(mirror.folder, 4)
    monkeypatch.setattr(Faulty, "breaks_at", "step_00000004/SHA256SUMS")
    with pytest.raises(OSError, match="the line is dead"):
        mirror.upload(4)
    other = Mirror(machine("b"))
    other.fetch()
    assert [path.name for path in (other.folder / "checkpoints").iterdir()] == ["step_00000002"]
    monkeypatch.setattr(Faulty, "breaks_at", "no file")
    Mirror(machine("a")).fetch()
    assert mirror.whole_steps() == [2, 4]
    other.fetch()
    assert (other.folder / WEIGHTS).read_text() == "after step 4"
    assert (other.folder / "metrics.jsonl").read_text() == "up to step 4"


def test_old_checkpoints_go_from_the_url_by_the_same_rule_and_half_uploaded_ones_too(machine):
    config = machine("a", "faulty://bucket/run", "keep_last=1", "keep_every=4")
    Mirror(config).system.pipe_file("/bucket/run/checkpoints/step_00000001/model.safetensors", b"half")
    mirror = begun_run(config, 2, 4, 6, 8, 10)
    assert mirror.names("checkpoints", kind="directory") == ["step_00000004", "step_00000008", "step_00000010"]
    assert mirror.whole_steps() == [4, 8, 10]


def test_a_checkpoint_damaged_at_the_url_is_named_and_the_one_before_it_used(machine, capsys):
    mirror = begun_run(machine("a"), 2, 4)
    mirror.system.pipe_file("/bucket/run/checkpoints/step_00000004/model.safetensors", b"other bytes")
    other = Mirror(machine("b"))
    other.fetch()
    assert [path.name for path in (other.folder / "checkpoints").iterdir()] == ["step_00000002"]
    assert "faulty://bucket/run/checkpoints/step_00000004 is damaged (model.safetensors has" in capsys.readouterr().err


def test_a_machine_whose_state_is_older_takes_the_newer_one(machine):
    begun_run(machine("a"), 2)
    other = Mirror(machine("b"))
    other.fetch()
    add_checkpoint(other.folder, 4)
    other.upload(4)
    first = Mirror(machine("a"))
    first.fetch()
    assert (first.folder / WEIGHTS).read_text() == "after step 4"
    assert remote_run.newest_whole(first.folder / "checkpoints") == 4


def test_a_run_that_was_removed_at_its_url_begins_anew(machine):
    mirror = begun_run(machine("a"), 2)
    mirror.system.rm(mirror.root, recursive=True)
    mirror.fetch()
    assert not mirror.folder.exists()


def test_steps_that_were_never_uploaded_are_not_given_up_for_another_run(machine):
    mirror = begun_run(machine("a"), 2)
    add_checkpoint(mirror.folder, 4)
    mirror.system.rm(mirror.root, recursive=True)
    begun_run(machine("b"), 2, begun="tomorrow")
    with pytest.raises(ValueError, match=r"a is after step 4 of a run that faulty://bucket/run does not hold: remove"):
        mirror.fetch()
    assert remote_run.newest_whole(mirror.folder / "checkpoints") == 4


def test_a_url_with_other_things_is_left_alone(machine):
    mirror = Mirror(machine("a"))
    mirror.system.pipe_file("/bucket/run/thesis.txt", b"mine")
    with pytest.raises(ValueError, match="faulty://bucket/run holds files but no run"):
        mirror.fetch()
    assert mirror.names() == ["thesis.txt"]


def test_folders_of_somebody_else_among_the_checkpoints_at_a_url_are_left_alone(machine):
    mirror = begun_run(machine("a", "faulty://bucket/run", "keep_last=1"), 2)
    for name in ("best", "step_best"):
        mirror.system.pipe_file(f"/bucket/run/checkpoints/{name}/notes.txt", b"mine")
    add_checkpoint(mirror.folder, 4)
    mirror.upload(4)
    assert mirror.names("checkpoints", kind="directory") == ["best", "step_00000004", "step_best"]
    other = Mirror(machine("b"))
    other.fetch()
    assert [path.name for path in (other.folder / "checkpoints").iterdir()] == ["step_00000004"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}"])
def test_a_damaged_file_of_a_run_at_a_url_is_named(machine, data):
    mirror = begun_run(machine("a"), 2)
    mirror.system.pipe_file("/bucket/run/versions.json", data)
    with pytest.raises(ValueError, match=r"^faulty://bucket/run/versions.json is damaged: give another URL as out$"):
        Mirror(machine("b")).fetch()


def test_a_listing_that_fails_is_not_taken_for_an_empty_folder(machine, monkeypatch):
    def broken(self, *_, **__):
        raise PermissionError("not for you")

    mirror = begun_run(machine("a"), 2)
    monkeypatch.setattr(Faulty, "ls", broken)
    with pytest.raises(OSError, match="not for you"):
        mirror.fetch()
    assert remote_run.newest_whole(mirror.folder / "checkpoints") == 2


def test_what_cannot_be_written_is_refused_in_one_sentence(tiny_config):
    for url in ("https://host/run", "simplecache::s3://bucket/run"):
        with pytest.raises(ValueError, match="cannot be written: give a folder, or a URL such as s3://bucket/run"):
            tiny_config(f"out={url}")
    with pytest.raises(ValueError, match=r"out: nothing://bucket/run cannot be used: Protocol not known: nothing"):
        run_at(tiny_config("out=nothing://bucket/run"))
    with pytest.raises(ValueError, match=r"working_folder is for a run at a URL"):
        tiny_config("working_folder=here")


def test_a_home_folder_is_found_for_a_run_too(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_at(tiny_config("out=~/runs/a")).folder == tmp_path / "runs/a"


def test_each_url_has_its_own_folder_to_work_in(tmp_path):
    places = {cached_under(url) for url in ("s3://a/run", "s3://b/run", "gs://a/run")}
    assert len(places) == 3
    assert all(place.name.startswith("run-") and place.is_relative_to(tmp_path / "cache") for place in places)
