"""The loop on a tiny model: it learns, repeats itself exactly, goes on exactly, and stops where it must."""

import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from softmoe_clip.data_pipelines.ledger import read_ledger
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.training.checksums import write_checksums
from softmoe_clip.training.loop import (
    Stopped,
    every,
    stop_signals,
    train,
)
from softmoe_clip.training.run_log import RunLog
from softmoe_clip.training.setup import check_batch_size

WEIGHTS = "model/open_clip_model.safetensors"
SPEED = ("pairs_per_second", "seconds")


def metrics(run):
    """The numbers of each line, without those that tell how fast it was."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Each test works in its own folder, and may choose another precision, which Accelerate keeps for a process."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def whole_run(tiny_settings, tmp_path_factory):
    """A run of six steps that nothing disturbed."""
    from softmoe_clip.config import TrainConfig
    from softmoe_clip.data_pipelines.strict import load_strict

    out = tmp_path_factory.mktemp("whole") / "run"
    return train(load_strict(TrainConfig, {"out": str(out), **tiny_settings}))


def test_a_run_leaves_what_the_readme_says(whole_run, scenes):
    names = {path.name for path in whole_run.iterdir()}
    files = {"config.yaml", "versions.json", "trained_parameters.txt", "metrics.jsonl"}
    assert names == files | {"tensorboard", "checkpoints", "model"}
    assert sorted(p.name for p in (whole_run / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    lines = metrics(whole_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["samples_seen"] for line in lines] == [8, 16, 24, 32, 40, 48]
    assert lines[0]["lr"] == 0
    assert lines[2]["lr"] == 0.001
    assert {"loss", "logit_scale", "gradient_norm", "replaced"} <= lines[0].keys()
    assert any(name.startswith("routing/") and name.endswith("/dispatch_entropy") for name in lines[0])


def test_the_model_of_a_run_loads_and_has_learned(whole_run, tiny_config):
    import softmoe_clip
    from softmoe_clip.training.build import build

    loaded = softmoe_clip.load(whole_run)
    trained, fresh = loaded.model.state_dict(), build(tiny_config()).model.state_dict()
    assert trained.keys() == fresh.keys()
    assert not torch.equal(trained["visual.conv1.weight"], fresh["visual.conv1.weight"])
    checkpoint = load_file(whole_run / "checkpoints/step_00000006/model.safetensors")
    assert all(torch.equal(trained[name], checkpoint[name]) for name in trained)


@pytest.mark.parametrize("change", ["seed=0", "data.num_workers=1", "data.num_workers=2", "checkpoint_every=0"])
def test_the_same_seed_gives_the_same_bits_whoever_loads_the_pictures(whole_run, tiny_config, change):
    again = train(tiny_config(change))
    assert (again / WEIGHTS).read_bytes() == (whole_run / WEIGHTS).read_bytes()
    assert metrics(again) == metrics(whole_run)


def test_another_seed_gives_another_run(whole_run, tiny_config):
    other = train(tiny_config("seed=1", "steps=2"))
    assert [line["loss"] for line in metrics(other)] != [line["loss"] for line in metrics(whole_run)[:2]]


def test_a_run_that_is_given_more_steps_goes_on_where_it_was(tiny_config):
    train(tiny_config("steps=3", "optim.schedule=constant"))
    run = train(tiny_config("steps=6", "optim.schedule=constant"))
    in_one = train(tiny_config("steps=6", "optim.schedule=constant", f"out={run}_in_one"))
    assert (run / WEIGHTS).read_bytes() == (in_one / WEIGHTS).read_bytes()
    assert metrics(run) == metrics(in_one)


def test_a_finished_run_says_so_and_changes_nothing(whole_run, tiny_config, folder_bytes, capsys):
    before = folder_bytes(whole_run)
    times = {path: path.stat().st_mtime_ns for path in whole_run.rglob("*")}
    assert train(tiny_config(f"out={whole_run}")) == whole_run
    assert "is finished (6 steps); nothing to do" in capsys.readouterr().err
    assert folder_bytes(whole_run) == before
    assert {path: path.stat().st_mtime_ns for path in whole_run.rglob("*")} == times


def test_a_run_that_lost_its_last_checkpoint_ends_the_same(whole_run, tiny_config, capsys):
    run = train(tiny_config())
    damaged = run / "checkpoints/step_00000006/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    run = train(tiny_config("steps=7"))
    assert "step_00000006 is damaged" in (told := capsys.readouterr().err)
    assert "going on after step 4 of 7" in told
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_the_loss_falls_on_a_set_that_can_be_learned_by_heart(tiny_config, loss):
    run = train(
        tiny_config(
            f"loss={loss}",
            "steps=60",
            "batch_size=60",
            "checkpoint_every=0",
            "data.caption=first",
            "data.crop_scale=[1,1]",
            "optim.lr=0.003",
        )
    )
    first, last = metrics(run)[0]["loss"], metrics(run)[-1]["loss"]
    assert last < 0.8 * first


def test_held_out_pairs_and_a_suite_are_measured_in_between_and_at_the_end(tiny_config, scenes, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"root: {scenes}\ntasks:\n  - {{kind: retrieval, name: scenes, data: val}}\n")
    run = train(tiny_config(f"data.val={scenes}/val", f"eval.suite={suite}", "eval.every=4"))
    measured = [line for line in metrics(run) if "val/loss" in line]
    assert [line["step"] for line in measured] == [4, 6]
    assert all(line["val/loss"] > 0 for line in measured)
    assert 0 <= measured[0]["eval/retrieval/scenes/image_to_text/recall@1"] <= 1
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["step_00000004.json", "step_00000006.json"]


def test_measuring_in_between_changes_nothing(whole_run, tiny_config, scenes):
    run = train(tiny_config(f"data.val={scenes}/val", "eval.every=1"))
    assert (run / WEIGHTS).read_bytes() == (whole_run / WEIGHTS).read_bytes()


def test_each_loss_starts_from_the_scale_and_bias_of_its_paper(tiny_config):
    from softmoe_clip.training.build import build

    clip, siglip = (build(tiny_config(f"loss={loss}")).model for loss in ("clip", "siglip"))
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert clip.logit_bias is None
    assert siglip.logit_scale.exp().item() == pytest.approx(10)
    assert siglip.logit_bias.item() == -10


def test_the_clip_loss_clamps_its_scale_and_siglip_does_not(tiny_config):
    ceiling = math.log(100)  # as CLIP has it, not as our constant says
    start = ceiling + 1
    for loss, held in (("clip", True), ("siglip", False)):
        run = train(
            tiny_config(f"loss={loss}", f"model.init_logit_scale={start}", "steps=1", "optim.warmup=0", f"out={loss}")
        )
        scale = load_file(run / WEIGHTS)["logit_scale"].item()
        assert scale == pytest.approx(ceiling if held else start, abs=0.1)


def spoil(run, value):
    """Put a value into one weight of the newest checkpoint."""
    file = max((run / "checkpoints").iterdir()) / "model.safetensors"
    weights = load_file(file)
    weights["visual.conv1.weight"][0, 0, 0, 0] = value
    save_file(weights, file)
    write_checksums(file.parent)


def test_a_loss_that_is_no_number_stops_the_run_with_step_and_keys(tiny_config, scenes, tmp_path):
    run = train(tiny_config("steps=4"))
    spoil(run, float("nan"))
    with pytest.raises(
        ValueError, match=r"loss is nan at step 5, sample keys (\d{9} ?){8}: lower optim\.lr"
    ) as stopped:
        train(tiny_config("steps=6"))
    assert set(str(stopped.value).split("keys ")[1].split(":")[0].split()) <= set(ShardSet.open(f"{scenes}/train").keys)
    assert max(path.name for path in (run / "checkpoints").iterdir()) == "step_00000004"


def test_a_rate_that_is_far_too_high_never_writes_broken_weights(tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"(loss|gradient norm) is (nan|inf) at step \d"):
        train(tiny_config("optim.lr=1e30", "optim.warmup=0", "checkpoint_every=1"))
    for file in (tmp_path / "run/checkpoints").glob("*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_bad_samples_are_replaced_and_listed(tiny_config, scenes, tmp_path):
    good = ShardSet.open(f"{scenes}/train")
    with ShardWriter(tmp_path / "shards", shard_size=10) as writer:
        for number in range(20):
            members = good.read(number).members
            picture = members.get("png") or members["jpg"]
            if number == 3:
                picture = picture[: len(picture) // 2]
            captions = [] if number == 12 else members["txt"].decode().splitlines()
            writer.add(picture, "png" if "png" in members else "jpg", captions)
    run = train(tiny_config(f"data.train={tmp_path}/shards", "batch_size=10", "steps=4"))
    listed = read_ledger(run / "skipped.jsonl")
    assert [(entry["key"], entry["shard"]) for entry in sorted(listed, key=lambda entry: entry["key"])] == [
        ("000000003", "00000.tar"),
        ("000000003", "00000.tar"),
        ("000010002", "00001.tar"),
        ("000010002", "00001.tar"),
    ]  # four steps of ten are two passes over twenty samples
    assert all(entry["reason"] and entry["substitute_key"] and 1 <= entry["step"] <= 4 for entry in listed)
    assert metrics(run)[-1]["replaced"] == 4


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_to_the_same_end(
    whole_run, tiny_config, monkeypatch, capsys, name
):
    def write_and_signal(log, step, numbers):
        write(log, step, numbers)
        if step == 2:
            os.kill(os.getpid(), getattr(signal, name))

    write = RunLog.write
    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "write", write_and_signal)
        with pytest.raises(Stopped, match="stopped after step 3 of 6; start the same command again to go on"):
            train(tiny_config())
    assert signal.getsignal(getattr(signal, name)) == before
    run = train(tiny_config())
    assert "going on after step 3 of 6" in capsys.readouterr().err
    assert (run / WEIGHTS).read_bytes() == (whole_run / WEIGHTS).read_bytes()
    assert metrics(run) == metrics(whole_run)


def test_a_second_ctrl_c_stops_at_once():
    with stop_signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("optim.warmup=60", r"optim\.warmup 60 .* do not fit into 6 steps"),
        ("data.train=nowhere", "nowhere"),
        ("data.val=nowhere", "nowhere"),
        ("eval.suite=nowhere.yaml", "nowhere.yaml"),
        ("tokenizer=nowhere.model", "nowhere.model"),
        ("model.arch=SoftMoE-demmo", "did you mean 'SoftMoE-demo'"),
        ("model.image_moe.layers=[7]", "7"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(tiny_config, tmp_path, change, told):
    with pytest.raises((ValueError, OSError), match=told):
        train(tiny_config(change))
    assert not (tmp_path / "run").exists()


def test_the_processes_share_a_batch_equally():
    check_batch_size(8, 2)
    with pytest.raises(ValueError, match="batch_size 9 is global and must divide by the 2 processes"):
        check_batch_size(9, 2)


def test_bfloat16_trains_too(tiny_config):
    assert all(0 < line["loss"] < 100 for line in metrics(train(tiny_config("precision=bf16", "steps=3"))))


def test_runs_of_one_python_process_may_differ_in_precision(whole_run, tiny_config):
    half = train(tiny_config("precision=bf16", "steps=2", f"out={tiny_config().out}_half"))
    assert (train(tiny_config()) / WEIGHTS).read_bytes() == (whole_run / WEIGHTS).read_bytes()
    assert metrics(half)[0]["loss"] != metrics(whole_run)[0]["loss"]


def test_every_counts_steps_and_always_meets_the_last():
    assert [step for step in range(1, 11) if every(4, step, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if every(0, step, 10)] == [10]


def test_progress_counts_what_was_done_before(monkeypatch, capsys):
    monkeypatch.delenv("SOFTMOE_CLIP_QUIET")
    monkeypatch.setattr("softmoe_clip.data_pipelines.progress.SECONDS_BETWEEN_LINES", 0.0)
    with progress("training", total=6, unit="steps", already=4) as advance:
        advance(1, note="loss 1.000")
    assert "training: 5/6 steps" in capsys.readouterr().err
