"""Numbers that are none stop a run and leave a file that says where they came from; gradient norms by tower."""

import json
import multiprocessing
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from softmoe_clip.training.checksums import write_checksums
from softmoe_clip.training.guards import (
    KEYS_TOLD,
    first_output_not_finite,
    gradient_norms,
    must_stop,
    plain,
    tower_of,
)
from softmoe_clip.training.loop import train


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Each test works in its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def four_steps(tiny_settings, tmp_path_factory):
    """A short run, to be copied and broken."""
    from softmoe_clip.config import TrainConfig
    from softmoe_clip.data_pipelines.strict import load_strict

    out = tmp_path_factory.mktemp("guards") / "run"
    return train(load_strict(TrainConfig, {"out": str(out), **tiny_settings}, ["steps=4", "optim.schedule=constant"]))


def broken_run(run, folder, name, value):
    """A copy of a run whose newest checkpoint has one wrong weight."""
    import shutil

    copy = shutil.copytree(run, folder / "run")
    file = max((copy / "checkpoints").iterdir()) / "model.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[0] = value
    save_file(weights, file)
    write_checksums(file.parent)
    return copy


def test_the_file_names_the_weight_the_module_the_pairs_and_the_routing(four_steps, tiny_config, tmp_path):
    run = broken_run(four_steps, tmp_path, "visual.transformer.resblocks.0.mlp.c_fc.weight", float("inf"))
    with pytest.raises(ValueError, match=r"^loss is nan at step 5, .*; what led there stands in .*step_00000005.json$"):
        train(tiny_config("steps=6", "optim.schedule=constant"))
    record = json.loads((run / "not_finite/step_00000005.json").read_text())
    assert (record["what"], record["value"], record["step"]) == ("loss", "nan", 5)
    assert record["samples_seen"] == 32
    assert record["lr"] == pytest.approx(0.001)
    assert record["logit_scale"] == pytest.approx(10, rel=0.1)
    assert [(found["name"], found["inf"]) for found in record["parameters_not_finite"]] == [
        ("visual.transformer.resblocks.0.mlp.c_fc.weight", 1)
    ]
    [process] = record["processes"]
    first = process["first_output_not_finite"]
    assert (first["module"], first["inputs_finite"]) == ("visual.transformer.resblocks.0.mlp.c_fc", True)
    assert process["routing"]["image/block_1"]["dispatch_entropy"] == "nan"
    assert [pair["position"] for pair in process["pairs"]] == list(range(32, 40))
    assert all(pair["caption"] and len(pair["key"]) == 9 for pair in process["pairs"])
    assert record["gradients_not_finite"] is None


@pytest.fixture
def overflow(monkeypatch):
    """Let a gradient overflow at each step."""

    def norms(model, mesh):
        model.visual.conv1.weight.grad[0] = float("inf")
        return gradient_norms(model, mesh)

    monkeypatch.setattr("softmoe_clip.training.loop.gradient_norms", norms)


def test_a_gradient_that_overflows_alone_is_found_and_named(overflow, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"^gradient norm is inf at step 1, sample keys"):
        train(tiny_config("steps=2"))
    record = json.loads((tmp_path / "run/not_finite/step_00000001.json").read_text())
    assert record["gradients_not_finite"] == ["visual.conv1.weight"]
    assert record["gradient_norm/visual"] == "inf"
    assert record["gradient_norm/text"] > 0
    assert record["parameters_not_finite"] == []
    assert record["processes"][0]["first_output_not_finite"] is None
    assert record["processes"][0]["routing"]["image/block_1"]["dispatch_max"] > 0


def test_a_folder_that_cannot_be_written_does_not_hide_the_reason(four_steps, tiny_config, tmp_path):
    run = broken_run(four_steps, tmp_path, "logit_scale", float("nan"))
    (run / "not_finite").write_text("in the way")
    with pytest.raises(ValueError, match=r"loss is nan at step 5.*not_finite/step_00000005.json could not be written"):
        train(tiny_config("steps=6", "optim.schedule=constant"))


def test_a_large_batch_does_not_fill_the_screen(overflow, tiny_config):
    with pytest.raises(ValueError, match="and 4 more: lower") as stopped:
        train(tiny_config(f"batch_size={KEYS_TOLD + 4}"))
    assert len(str(stopped.value).split("keys ")[1].split(" and")[0].split()) == KEYS_TOLD


def part_of_two(settings, overrides, port, rank, told, fails_at):
    """Train as one of two processes; tell how it ended and how many took part.

    The second one gets no memory the `fails_at`-th time that it looks at pictures without a gradient.
    """
    import os

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    from softmoe_clip.config import TrainConfig
    from softmoe_clip.data_pipelines.strict import load_strict

    looks = []

    def fail(module, inputs):
        if isinstance(module, nn.Conv2d) and not torch.is_grad_enabled():
            looks.append(module)
            if len(looks) == fails_at:
                raise MemoryError("no memory for these pictures")

    if rank == 1 and fails_at:
        nn.modules.module.register_module_forward_pre_hook(fail)
    try:
        train(load_strict(TrainConfig, settings, overrides))
        told.put((rank, "finished", 0))
    except ValueError as error:
        told.put((rank, str(error), torch.distributed.get_world_size()))


@pytest.fixture
def stopped_record(four_steps, tiny_settings, tmp_path):
    """Let two processes run into a weight that is none; both must say the same, and return the file they left."""

    def run(*overrides, fails_at=0):
        run = broken_run(four_steps, tmp_path, "visual.conv1.weight", float("nan"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "accelerate", "open_clip", "softmoe_clip.training.loop"])
        told = context.Queue()
        settings = {"out": str(run), **tiny_settings}
        overrides = ["steps=6", "optim.schedule=constant", *overrides]
        started = (settings, overrides, port)
        both = [context.Process(target=part_of_two, args=(*started, rank, told, fails_at)) for rank in (0, 1)]
        for process in both:
            process.start()
        try:
            ends = sorted(told.get(timeout=120) for _ in both)
        finally:
            for process in both:
                process.join(timeout=10)
                process.kill()
        assert [end[0] for end in ends] == [0, 1]
        assert [end[2] for end in ends] == [2, 2]
        assert ends[0][1] == ends[1][1]
        record = json.loads((run / "not_finite/step_00000005.json").read_text())
        assert [process["rank"] for process in record["processes"]] == [0, 1]
        pairs = [pair for process in record["processes"] for pair in process["pairs"]]
        assert [pair["position"] for pair in pairs] == list(range(32, 40))
        assert " ".join(pair["key"] for pair in pairs) in ends[0][1]
        assert [found["name"] for found in record["parameters_not_finite"]] == ["visual.conv1.weight"]
        return record

    return run


@pytest.mark.slow
def test_all_processes_stop_with_the_same_words_and_one_file_holds_the_whole_batch(stopped_record):
    record = stopped_record()
    assert {process["first_output_not_finite"]["module"] for process in record["processes"]} == {"visual.conv1"}


@pytest.mark.slow
def test_a_process_without_memory_for_a_second_look_says_so_and_the_others_look(stopped_record):
    processes = stopped_record("chunk_size=2", fails_at=3)["processes"]  # each step looks at two chunks twice
    assert processes[0]["first_output_not_finite"]["module"] == "visual.conv1"
    assert processes[1]["first_output_not_finite"] is None
    assert processes[1]["problem"] == "the step could not be computed again: no memory for these pictures"


@pytest.mark.slow
@pytest.mark.parametrize("fails_at", [0, 1])
@pytest.mark.parametrize("override", ["sharding=full", "expert_parallel=2"])
def test_processes_that_compute_together_look_again_once_what_they_know_is_written(stopped_record, override, fails_at):
    processes = stopped_record(override, fails_at=fails_at)["processes"]
    problem = "the step could not be computed again" if fails_at else None
    assert [process["problem"] for process in processes] == [problem] * 2
    for process in processes:
        assert bool(process["routing"]) != bool(fails_at)
        assert process["first_output_not_finite"] is None or process["first_output_not_finite"]["module"]


class TwoTowers(nn.Module):
    """Parameters with open_clip's names; `text` at the top, as in its `CLIP`, where `custom` is False."""

    def __init__(self, custom=True):
        super().__init__()
        self.visual = nn.Linear(3, 4)
        self.logit_scale = nn.Parameter(torch.ones(()))
        setattr(self, "text" if custom else "transformer", nn.Linear(4, 2))
        self.unused = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("custom", [True, False])
def test_norms_by_tower_are_those_of_their_gradients_laid_end_to_end(custom):
    torch.manual_seed(0)
    model = TwoTowers(custom)
    text = model.text if custom else model.transformer
    (text(model.visual(torch.randn(5, 3))).square().sum() * model.logit_scale).backward()
    found = gradient_norms(model)
    flat = {
        "gradient_norm/visual": torch.cat([p.grad.flatten() for p in model.visual.parameters()]),
        "gradient_norm/text": torch.cat([p.grad.flatten() for p in text.parameters()]),
        "gradient_norm/others": model.logit_scale.grad,
    }
    expected = {name: gradients.norm().item() for name, gradients in flat.items()}
    expected["gradient_norm"] = sum(norm**2 for norm in expected.values()) ** 0.5
    assert found.by_tower() == pytest.approx(expected, rel=1e-6)
    assert found.not_finite() == []
    parameters = [p for p in model.parameters() if p.grad is not None]
    before = [p.grad.clone() for p in parameters]
    nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, found.total)
    clipped = [p.grad.clone() for p in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad.copy_(gradient)
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.5).equal(found.total)
    assert all(p.grad.equal(gradient) for p, gradient in zip(parameters, clipped, strict=True))


def test_a_parameter_belongs_to_the_tower_that_open_clip_puts_it_in():
    names = ("visual.conv1.weight", "text.ln_final.bias", "transformer.resblocks.0", "text_projection", "logit_bias")
    assert [tower_of(name) for name in names] == ["visual", "text", "text", "text", "others"]


def test_a_frozen_tower_has_no_norm(tiny_config):
    run = train(tiny_config("freeze=['^visual']", "steps=2"))
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    norms = {name for name in line if name.startswith("gradient_norm")}
    assert norms == {"gradient_norm", "gradient_norm/text", "gradient_norm/others"}


def test_the_innermost_module_is_named_and_whether_it_got_good_numbers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.Linear(2, 2))
    with torch.no_grad(), first_output_not_finite(model) as found:
        model(torch.ones(1, 2))
    assert found == []
    with torch.no_grad():
        model[1][1].bias[0] = float("inf")
    with torch.no_grad(), first_output_not_finite(model) as found:
        model(torch.ones(3, 2))
    kinds = {"module": "1.1", "type": "Linear", "inputs_finite": True, "shape": [3, 2], "nan": 0, "inf": 3, "of": 6}
    assert found == [kinds]
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad(), first_output_not_finite(model) as found:
        model(torch.full((1, 2), float("nan")))
    assert (found[0]["module"], found[0]["inputs_finite"]) == ("0", False)


@pytest.mark.parametrize(
    ("norm", "scale", "stops"),
    [(1.0, None, False), (float("nan"), None, True), (float("inf"), 65536.0, False), (float("inf"), 0.5, True)],
)
def test_an_overflow_in_fp16_is_passed_over_until_the_loss_scale_is_spent(norm, scale, stops):
    class Accelerator:
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)

    assert must_stop(norm, Accelerator()) == stops


def test_what_json_cannot_hold_becomes_words():
    nan, inf = float("nan"), float("inf")
    found = json.dumps(plain({"a": nan, 1: (inf, -inf, 0.5), "b": {"c": None, "d": True}}), allow_nan=False)
    assert json.loads(found) == {"a": "nan", "1": ["inf", "-inf", 0.5], "b": {"c": None, "d": True}}
