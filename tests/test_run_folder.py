"""A run folder goes on only as the run it was begun as; what differs is named."""

import json
import os

import pytest
from omegaconf import OmegaConf

from softmoe_clip.training.run_folder import as_tree, begin, is_finished, newest_step, seen_by_run
from softmoe_clip.training.run_lock import LOCK_FILE


class Data:
    """All that a run folder wants to know of a shard set."""

    def __init__(self, fingerprint="abc", num_shards=1):
        self.fingerprint = lambda: fingerprint
        self.counts = [60] * num_shards

    def __len__(self):
        return 60


@pytest.fixture
def run(tmp_path, tiny_config):
    """A run that was begun and has a checkpoint after step 4 of 6."""
    folder = tmp_path / "run"
    begin(folder, tiny_config(), Data(), {})
    (folder / "checkpoints/step_00000004").mkdir(parents=True)
    return folder


def test_a_run_begins_with_its_config_and_what_it_ran_on(run, tiny_config):
    from omegaconf import OmegaConf

    assert OmegaConf.to_container(OmegaConf.load(run / "config.yaml")) == as_tree(tiny_config())
    facts = json.loads((run / "versions.json").read_text())
    assert facts["data"] == "abc"
    assert facts["pairs"] == 60
    assert {"softmoe-clip", "torch", "python", "threads", "device", "git"} <= facts.keys()
    assert newest_step(run) == 4


@pytest.mark.parametrize(
    "change",
    [
        "steps=12",
        "data.num_workers=1",
        "data.cache_gib=7.5",
        "log_every=3",
        "checkpoint_every=5",
        "keep_last=1",
        "keep_every=4",
        "eval.every=3",
        "eval.suite=configs/suites/scenes.yaml",
    ],
)
def test_what_makes_no_other_run_may_change(run, tiny_config, change):
    begin(run, tiny_config(change), Data(), {})
    key, value = change.split("=")
    assert f"{key.split('.')[-1]}: {value}" in (run / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("optim.lr=0.5", "optim.lr: 0.001 then, 0.5 now"),
        ("seed=1", "seed: 0 then, 1 now"),
        ("batch_size=16", "batch_size: 8 then, 16 now"),
        ("data.crop_scale=[0.5,1.0]", r"data.crop_scale: \[0.7, 1.0\] then, \[0.5, 1.0\] now"),
        ("model.image_moe.num_experts=2", "model.image_moe.num_experts: 4 then, 2 now"),
        ("model.image_moe=null", "model.image_moe.num_experts: 4 then, None now"),
        ("loss=clip", "loss: 'siglip' then, 'clip' now"),
        ("data.val=elsewhere", "data.val: None then, 'elsewhere' now"),
        ("data.train=[{shards: a, weight: 2}]", r"data.train: .* then, \[{'shards': 'a', 'weight': 2.0}\] now"),
        ("data.window=8", "data.window: 32 then, 8 now"),
        ("data.train=pipe:cat a.tar", "data.train: .* then, 'pipe:cat a.tar' now"),
        ("data.train=s3://bucket/{0..9}.tar", "data.train: .* then, 's3://bucket/{0..9}.tar' now"),
        ("tokenizer=open_clip", "tokenizer: .* then, 'open_clip' now"),
    ],
)
def test_what_makes_another_run_is_refused_with_the_difference(run, tiny_config, change, told, folder_bytes):
    before = folder_bytes(run)
    with pytest.raises(ValueError, match=f"begun with other settings .*{told}.*give another folder as out"):
        begin(run, tiny_config(change), Data(), {})
    assert folder_bytes(run) == before


def test_data_may_lie_elsewhere_when_it_is_the_same(run, tiny_config):
    moved = tiny_config("data.train=elsewhere")
    with pytest.raises(ValueError, match="begun with other data than elsewhere holds now"):
        begin(run, moved, Data("def"), {})
    begin(run, moved, Data(), {})
    assert "train: elsewhere" in (run / "config.yaml").read_text()


def test_a_run_from_before_there_were_windows_goes_on_where_its_order_is_the_same(run, tiny_config):
    saved = run / "config.yaml"
    saved.write_text(saved.read_text().replace("  window: 32\n", ""))
    without = saved.read_text()
    for change, num_shards in (("data.window=32", 32), ("data.window=0", 33)):
        saved.write_text(without)
        begin(run, tiny_config(change), Data(num_shards=num_shards), {})
    saved.write_text(without)
    with pytest.raises(ValueError, match=r"data\.window: 0 then, 32 now"):
        begin(run, tiny_config(), Data(num_shards=33), {})


def test_a_run_with_decay_rules_of_its_own_goes_on_under_them_and_no_others(run, tiny_config):
    own, saved = "optim.weight_decay={'.*': 0.05}", run / "config.yaml"
    begin(run, tiny_config(), Data(), {})
    with pytest.raises(ValueError, match=r"optim\.weight_decay\.\.\*: 0\.1 then, 0\.05 now"):
        begin(run, tiny_config(own), Data(), {})
    saved.write_text(OmegaConf.to_yaml(OmegaConf.create(as_tree(tiny_config(own)))))
    begin(run, tiny_config(own), Data(), {})
    with pytest.raises(ValueError, match=r"optim\.weight_decay\.\.\*: 0\.05 then, 0\.1 now"):
        begin(run, tiny_config(), Data(), {})


def test_a_run_without_decay_rules_goes_on_without_them(run, tiny_config):
    none = tiny_config("optim.weight_decay={}")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(as_tree(none))))
    begin(run, none, Data(), {})
    with pytest.raises(ValueError, match=r"optim\.weight_decay\.\.\*: None then, 0\.1 now"):
        begin(run, tiny_config(), Data(), {})


@pytest.mark.parametrize("rules", ["weight_decay", "lr_scale"])
def test_rules_in_another_order_make_another_run(run, tiny_config, rules):
    one, other = (tiny_config(f"optim.{rules}={{{r}}}") for r in ("'text': 0.1, '.*': 0.5", "'.*': 0.5, 'text': 0.1"))
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(as_tree(one))))
    begin(run, one, Data(), {})
    with pytest.raises(ValueError, match=rf"\(optim\.{rules}: its rules stood in another order then\)"):
        begin(run, other, Data(), {})


def test_all_differences_are_named(run, tiny_config):
    with pytest.raises(ValueError, match=r"\(optim.lr: 0.001 then, 0.5 now; seed: 0 then, 3 now\)"):
        begin(run, tiny_config("seed=3", "optim.lr=0.5", "steps=9"), Data(), {})


def test_other_data_under_the_same_name_is_refused(run, tiny_config):
    with pytest.raises(ValueError, match=r"begun with other data than .*train holds now"):
        begin(run, tiny_config(), Data("xyz"), {})


@pytest.mark.parametrize("steps", [6, 8])  # finished, or to go on
@pytest.mark.parametrize(
    ("name", "data", "state"),
    [
        ("versions.json", None, "missing"),
        *[("versions.json", data, "damaged") for data in (b"", b"{}", b"[]", b"\xff")],
        *[("config.yaml", data, "damaged") for data in (b"", b"a: [1", b"- a", b"\xff", b"out: run\nmodel: null\n")],
    ],
)
def test_a_damaged_file_of_a_run_is_named(run, tiny_config, name, data, state, steps):
    (run / "checkpoints/step_00000006").mkdir()
    (run / "model").mkdir()
    (run / name).unlink() if data is None else (run / name).write_bytes(data)
    config = tiny_config(f"steps={steps}")
    with pytest.raises(ValueError, match=f"/{name} is {state}: copy the run again, or give another folder$"):
        is_finished(run, config) or begin(run, config, Data(), {})


@pytest.mark.parametrize("data", ["", "[]"])
def test_how_pictures_are_prepared_is_not_read_from_a_damaged_file(run, data):
    (run / "versions.json").write_text(data)
    with pytest.raises(ValueError, match=r"versions\.json is damaged"):
        seen_by_run(run)


def test_without_a_checkpoint_there_is_nothing_to_be_true_to(tmp_path, tiny_config):
    run = tmp_path / "run"
    begin(run, tiny_config(), Data(), {})
    begin(run, tiny_config("optim.lr=0.5"), Data("xyz"), {})
    assert "lr: 0.5" in (run / "config.yaml").read_text()
    assert json.loads((run / "versions.json").read_text())["data"] == "xyz"


def test_a_process_killed_while_it_begins_a_run_leaves_one_that_can_be_begun(tmp_path, tiny_config):
    run = tmp_path / "run"
    run.mkdir()
    (run / "versions.json").write_text("{")
    (run / "config.yaml.tmp").write_text("out:")
    (run / LOCK_FILE).touch()
    with begin(run, tiny_config(), Data(), {}):
        assert (run / LOCK_FILE).exists()
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "versions.json"]


def test_a_folder_with_other_things_is_left_alone(tmp_path, tiny_config):
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files but no run"):
        begin(run, tiny_config(), Data(), {})
    assert [path.name for path in run.iterdir()] == ["thesis.txt"]


def test_a_file_is_no_run_folder(tmp_path, tiny_config):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="run is a file"):
        begin(tmp_path / "run", tiny_config(), Data(), {})


def test_another_number_of_threads_is_said(run, tiny_config, capsys):
    facts = json.loads((run / "versions.json").read_text())
    (run / "versions.json").write_text(json.dumps(facts | {"threads": 77}))
    begin(run, tiny_config(), Data(), {})
    assert "began with 77 threads" in capsys.readouterr().err


def test_what_a_later_start_ran_on_is_said_and_written_down(run, tiny_config, capsys, monkeypatch):
    facts = json.loads((run / "versions.json").read_text())
    assert facts["processes"] == 1
    begin(run, tiny_config(), Data(), {})
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("WORLD_SIZE", "4")
    (run / "versions.json").write_text(json.dumps(facts | {"torch": "1.0", "threads": 77}))
    for _ in range(2):
        begin(run, tiny_config(), Data(), {})
        told = capsys.readouterr().err
        assert f"this run began with torch 1.0 (now {facts['torch']}), processes 1 (now 4), threads 77 (now " in told
    now = {"torch": facts["torch"], "processes": 4, "threads": facts["threads"]}
    after = json.loads((run / "versions.json").read_text())
    assert after == facts | {"torch": "1.0", "threads": 77, "later": [{"after_step": 4} | now]}


def test_a_run_is_finished_at_its_last_step_and_not_before(run, tiny_config):
    assert not is_finished(run, tiny_config())
    (run / "checkpoints/step_00000006").mkdir()
    assert not is_finished(run, tiny_config())  # its model is missing
    (run / "model").mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        assert not is_finished(run, tiny_config())
        (run / "model" / name).touch()
    assert is_finished(run, tiny_config())
    assert not is_finished(run, tiny_config("steps=12"))
    with pytest.raises(ValueError, match="seed: 0 then, 1 now"):
        is_finished(run, tiny_config("seed=1"))


def test_nothing_there_is_not_finished(tmp_path, tiny_config):
    assert not is_finished(tmp_path / "run", tiny_config())


def test_what_cannot_be_brought_to_the_disk_replaces_nothing(run, tiny_config, monkeypatch):
    def no_disk(descriptor):
        raise OSError("no disk")

    names = "config.yaml", "versions.json"
    before = [(run / name).stat().st_ino for name in names]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_disk)
        with pytest.raises(OSError, match="no disk"):
            begin(run, tiny_config(), Data(), {})
    assert [(run / name).stat().st_ino for name in names] == before
    with begin(run, tiny_config(), Data(), {}):
        pass
    assert {path.name for path in run.iterdir()} == {*names, "checkpoints"}
