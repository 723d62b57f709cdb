"""Runs with low-rank adapters: exact resume, untouched base weights, and a plain model in the run's folder."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file

import softmoe_clip.plugin  # noqa: F401
from softmoe_clip.models.store import load
from softmoe_clip.training import setup
from softmoe_clip.training.loop import train

WEIGHTS = "model/open_clip_model.safetensors"
TIMM = {"image_size": 64, "timm_model_name": "softmoe_vit_demo_patch8_64", "timm_pool": "avg", "timm_proj": "linear"}
# What a run adapts: attention and experts of the image tower, or the text tower's attention.
IMAGE = r"""lora.targets=['visual[.].*[.]attn','visual[.].*[.]experts']"""
TEXT = r"""lora.targets=['text[.].*[.]attn','text[.].*c_fc']"""


@pytest.mark.parametrize("targets", [IMAGE, TEXT])
def test_a_run_from_a_model_writes_a_plain_model_that_computes_what_the_adapted_one_does(
    targets, tiny_config, tmp_path, monkeypatch
):
    start = train(tiny_config(f"out={tmp_path / 'start'}", "steps=1", "optim.warmup=1"))
    kept = []

    def keep(config, group, begun):
        kept.append(build_model(config))
        return kept[-1]

    build_model = setup.build
    monkeypatch.setattr(setup, "build", keep)
    run = train(tiny_config(targets, f"init={start}", "lora.rank=2", "optim.lr=0.01"))
    written, with_adapters = load(run).model, kept[0].model.eval()
    images, token_ids = torch.randn(3, 3, 32, 32), torch.randint(2, 90, (3, 12))
    with torch.inference_mode():
        for encode, inputs in (("encode_image", images), ("encode_text", token_ids)):
            found, expected = (getattr(model, encode)(inputs) for model in (written, with_adapters))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    before, after = load_file(start / WEIGHTS), load_file(run / WEIGHTS)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    tower = "visual" if targets == IMAGE else "text"
    projections = {"logit_scale", "logit_bias", "visual.proj", "text.text_projection"}
    assert before.keys() == after.keys()
    assert {name.partition(".")[0] for name in changed - projections} == {tower}
    assert all("attn.in_proj_weight" in name or "experts.w" in name or "c_fc" in name for name in changed - projections)
    listed = (run / "trained_parameters.txt").read_text().splitlines()
    assert {name for name in listed if ".lora_" not in name} == projections & before.keys()
    assert len(listed) > len(projections)


def test_a_run_that_was_cut_short_ends_with_the_same_bits(tiny_config, tmp_path):
    settings = [IMAGE, "optim.schedule=constant", "checkpoint_every=0"]
    whole = train(tiny_config(*settings, f"out={tmp_path / 'whole'}"))
    for steps in (2, 5, 6):
        run = train(tiny_config(*settings, f"out={tmp_path / 'run'}", f"steps={steps}"))
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    last = "checkpoints/step_00000006"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (run / last / file).read_bytes() == (whole / last / file).read_bytes()
    with pytest.raises(ValueError, match=r"lora.rank: 8 then, 4 now"):
        train(tiny_config(*settings, f"out={tmp_path / 'run'}", "lora.rank=4", "steps=7"))


def test_the_base_weights_of_a_run_keep_every_bit(tiny_config, tmp_path):
    start = train(tiny_config(f"out={tmp_path / 'start'}", "steps=1", "optim.warmup=1"))
    run = train(tiny_config(IMAGE, f"init={start}"))
    before = load_file(start / WEIGHTS)
    checkpoint = load_file(run / "checkpoints/step_00000006/model.safetensors")
    base = {name.replace(".base_layer", ""): tensor for name, tensor in checkpoint.items() if ".lora_" not in name}
    assert base.keys() == before.keys()
    changed = {name for name in base if not torch.equal(base[name], before[name])}
    assert changed <= {"logit_scale", "logit_bias", "visual.proj", "text.text_projection"}


@pytest.fixture
def another_precision():
    """Accelerate keeps one precision in a process; let it forget that before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("another_precision")
def test_a_run_in_bfloat16_trains_and_writes_float32(tiny_config):
    checkpoint = train(tiny_config(IMAGE, "precision=bf16", "steps=3")) / "checkpoints/step_00000003/model.safetensors"
    weights = load_file(checkpoint)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if ".lora_B." in name)


def test_open_clip_opens_the_model_of_a_run(tiny_config, architecture_file, tmp_path):
    file = tmp_path / "timm.json"
    file.write_text(json.dumps(json.loads(architecture_file.read_text()) | {"vision_cfg": TIMM}))
    settings = [f"model.arch={file}", "model.image_moe=null", "steps=2"]
    run = train(tiny_config(*settings, "lora.targets=['visual[.].*[.](qkv|experts)']"))
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{run / 'model'}")
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(theirs.eval().encode_image(images), load(run).model.encode_image(images))


def test_the_plan_says_what_is_trained(tiny_yaml, softmoe_clip, tmp_path):
    shown = softmoe_clip("train", tiny_yaml, f"out={tmp_path / 'run'}", IMAGE, "lora.rank=2", "--plan")
    assert shown.returncode == 0, shown.stderr
    # attention: 2 blocks, rank 2, 32 in, 96 out; experts: 1 block, 4 experts, twice 32 and 128.
    assert f"visual {2 * 2 * (32 + 96) + 2 * 4 * 2 * (32 + 128) + 32 * 16:,} of " in " ".join(shown.stdout.split())
    assert not (tmp_path / "run").exists()
