"""What only a GPU can tell: make test-gpu, on a machine that has one."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from softmoe_clip.eval.encoder import Encoder
from softmoe_clip.models.store import load
from softmoe_clip.training.loop import train
from softmoe_clip.training.plan import print_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
WEIGHTS = "model/open_clip_model.safetensors"


@pytest.fixture(autouse=True)
def new_accelerator():
    """Accelerate's state is the process's: another precision, or the CPU, needs another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("more", [(), ("chunk_size=4",), ("grad_checkpointing=true",), ("compile=true",)])
def test_every_precision_trains_and_no_kernel_draws_from_torchs_generator(tiny_config, precision, more):
    """The step itself refuses hidden draws, as a fused attention might make them."""
    run = train(tiny_config(f"precision={precision}", "steps=20", "optim.lr=0.003", *more))
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("router", ["tokens_choice", "experts_choice", "sinkhorn", "base", "hash"])
def test_every_router_trains_on_a_gpu(tiny_config, router):
    noise = ["model.image_moe.noise_std=1.0"] if router.endswith("choice") else []
    assert train(tiny_config(f"model.image_moe.router={router}", "precision=bf16", *noise))


def test_a_gpu_computes_the_losses_of_a_cpu(tiny_config, tmp_path, monkeypatch):
    torch.backends.cudnn.allow_tf32 = False
    on_gpu = losses(train(tiny_config(f"out={tmp_path}/gpu")))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = losses(train(tiny_config(f"out={tmp_path}/cpu")))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "nadamw", "lamb", "lion"])
def test_a_run_goes_on_from_its_checkpoint_on_a_gpu(tiny_config, tmp_path, optimizer):
    whole = train(tiny_config(f"optim.name={optimizer}", f"out={tmp_path}/whole", "optim.schedule=constant"))
    parts = [f"optim.name={optimizer}", f"out={tmp_path}/parts", "optim.schedule=constant"]
    train(tiny_config(*parts, "steps=3"))
    again = train(tiny_config(*parts))
    expected, found = (load_file(run / WEIGHTS) for run in (whole, again))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


def test_a_plan_counts_the_gpus_memory(tiny_config, capsys):
    print_plan(tiny_config())
    assert "cuda" in capsys.readouterr().out


def test_embeddings_of_a_gpu_are_those_of_a_cpu(tiny_config):
    run = train(tiny_config())
    texts = ["a red star", "two circles"]
    found = []
    for device in ("cpu", "cuda:0"):
        loaded = load(run, device)
        found.append(Encoder(loaded.model, loaded.tokenizer, loaded.transform, device).texts(texts))
    torch.testing.assert_close(*map(torch.from_numpy, found), rtol=1e-3, atol=1e-4)
