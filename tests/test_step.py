"""One step in chunks: the gradients of the whole batch, in float64, whatever draws masks and whatever is frozen."""

import json
from functools import partial

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import nn

from softmoe_clip.config import LoraConfig, ModelConfig, MoEConfig
from softmoe_clip.data_pipelines.loader import Batch
from softmoe_clip.models.create import create_model
from softmoe_clip.models.trunk import FromFeatures
from softmoe_clip.training.freeze import freeze, train_mode
from softmoe_clip.training.lora import add_adapters
from softmoe_clip.training.losses import LOSSES
from softmoe_clip.training.masks import draw_by_position
from softmoe_clip.training.step import Stepper, check_chunk_size

PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
NATIVE = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8, "patch_dropout": 0.5}
TIMM = {
    "image_size": 64,
    "timm_model_name": "softmoe_vit_demo_patch8_64",
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_drop": 0.1,
    "timm_drop_path": 0.4,
    "patch_dropout": 0.75,
}
TEXT = {"context_length": 5, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True}
NOISY = MoEConfig(router="tokens_choice", num_experts=4, noise_std=2.0, group_size=2, gshard_loss=0.1, load_loss=0.1)
SOFT = MoEConfig(num_experts=4)
NUM_PAIRS = 10


def model_of(tmp_path, vision, moe, loss):
    """A small model in float64, in train mode, that draws by position."""
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"embed_dim": 8, "custom_text": True, "vision_cfg": vision, "text_cfg": TEXT}))
    torch.manual_seed(0)
    model = create_model(ModelConfig(str(file), image_moe=moe, init_logit_scale=1.5, init_logit_bias=-2.0)).double()
    return model.train()


def ready(model):
    draw_by_position(model)
    train_mode(model)
    return model


def batch_of(image_size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(NUM_PAIRS, 3, image_size, image_size, generator=generator, dtype=torch.float64)
    if dtype == torch.uint8:
        images = (images * 60 + 128).clamp(0, 255).to(torch.uint8)
    return Batch(
        images=images,
        token_ids=torch.randint(1, 20, (NUM_PAIRS, 5), generator=generator),
        caption_ids=torch.arange(NUM_PAIRS) % 7,
        picture_ids=torch.arange(NUM_PAIRS) % 8,
        keys=[f"{number:09d}" for number in range(NUM_PAIRS)],
        captions=[""] * NUM_PAIRS,
        positions=list(range(100, 100 + NUM_PAIRS)),
        replaced=[],
    )


def outcome(model, batch, loss, chunk_size, towers=None, duplicates="negatives"):
    """The losses of a step, its routing statistics and the gradients of everything."""
    towers = towers or model
    towers.zero_grad(set_to_none=True)
    stepper = Stepper(model, towers, LOSSES[loss], PREPROCESS, torch.device("cpu"), 3, duplicates, chunk_size)
    done = stepper.forward_backward(batch, statistics=True)
    return done, {name: p.grad.clone() for name, p in towers.named_parameters() if p.grad is not None}


def assert_same_step(found, expected):
    (done, gradients), (whole, others) = found, expected
    torch.testing.assert_close(done.loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(done.aux_loss, whole.aux_loss, rtol=1e-12, atol=0)
    assert gradients.keys() == others.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], others[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("vision", "moe", "chunk_sizes"),
    [(NATIVE, SOFT, (1, 3, 10)), (NATIVE, NOISY, (2, 4)), (TIMM, None, (4,))],
    ids=["soft", "tokens choice with noise", "timm with drop path"],
)
def test_chunks_give_the_gradients_of_the_whole_batch(tmp_path, loss, vision, moe, chunk_sizes):
    model, batch = ready(model_of(tmp_path, vision, moe, loss)), batch_of(vision["image_size"])
    whole = outcome(model, batch, loss, None)
    assert {"logit_scale", "logit_bias"} <= whole[1].keys()
    assert (whole[0].aux_loss > 0) == (moe is NOISY)
    for chunk_size in chunk_sizes:
        assert_same_step(outcome(model, batch, loss, chunk_size), whole)
    shifted = outcome(model, batch._replace(positions=list(range(NUM_PAIRS))), loss, None)
    assert abs(shifted[0].loss - whole[0].loss) > 1e-6  # there are masks, and they depend on positions


@pytest.mark.parametrize("duplicates", ["positives", "masked"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_duplicates_are_found_across_chunks(tmp_path, loss, duplicates):
    model, batch = ready(model_of(tmp_path, NATIVE, None, loss)), batch_of(16)
    whole = outcome(model, batch, loss, None, duplicates=duplicates)
    assert_same_step(outcome(model, batch, loss, 3, duplicates=duplicates), whole)
    assert abs(whole[0].loss - outcome(model, batch, loss, None)[0].loss) > 1e-3


def test_routing_statistics_come_from_one_pass(tmp_path):
    model, batch = ready(model_of(tmp_path, NATIVE, NOISY, "clip")), batch_of(16)
    whole, chunked = (outcome(model, batch, "clip", size)[0].routing for size in (None, 2))
    assert whole.reports.keys() == chunked.reports.keys()
    assert [len(reports) for reports in chunked.reports.values()] == [5] * len(chunked.reports)
    assert chunked.summary() == pytest.approx(whole.summary(), rel=1e-4)


@pytest.mark.parametrize(("pattern", "side"), [("^visual", 0), ("^text", 1)])
def test_a_frozen_tower_runs_once(tmp_path, pattern, side):
    model = model_of(tmp_path, NATIVE, SOFT, "siglip")
    freeze(model, [pattern])
    model, batch = ready(model), batch_of(16)
    whole = outcome(model, batch, "siglip", None)
    calls = [0, 0]

    def count(module, arguments, result, place):
        calls[place] += 1

    for place, tower in enumerate((model.visual, model.text)):
        tower.register_forward_hook(partial(count, place=place))
    assert_same_step(outcome(model, batch, "siglip", 4), whole)
    assert calls[side] == 3
    assert calls[1 - side] == 6


def test_adapters_with_dropout_and_features_of_a_frozen_trunk_can_be_chunked(tmp_path):
    model = model_of(tmp_path, NATIVE, None, "clip").float()
    add_adapters(model, LoraConfig(targets=(".*c_fc",), rank=2, dropout=0.5), (), seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter)
    model, batch = ready(model.double()), batch_of(16)
    whole = outcome(model, batch, "clip", None)
    assert any(".lora_A" in name for name in whole[1])
    assert_same_step(outcome(model, batch, "clip", 3), whole)

    model = model_of(tmp_path, NATIVE, None, "clip")
    freeze(model, ["^visual"])
    features = batch._replace(images=torch.randn(NUM_PAIRS, 8, dtype=torch.float64))
    towers = ready(model)
    whole = outcome(FromFeatures(towers), features, "clip", None, towers)
    assert_same_step(outcome(FromFeatures(towers), features, "clip", 4, towers), whole)


def test_pixels_stay_bytes_until_their_chunk_is_run(tmp_path):
    model, batch = ready(model_of(tmp_path, NATIVE, None, "clip").float()), batch_of(16, torch.uint8)
    seen = []
    model.visual.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[0]))
    (done, _), (whole, _) = outcome(model, batch, "clip", 4), outcome(model, batch, "clip", None)
    assert seen == [4, 4, 2, 4, 4, 2, 10]
    torch.testing.assert_close(done.loss, whole.loss)


def open_clips_accumulation(model, batch, loss, chunk_size):
    """What open_clip's train loop does with accum_freq > 1, without masks: for each part the loss of all, again."""
    compare = ClipLoss() if loss == "clip" else SigLipLoss()
    parts = [slice(i, i + chunk_size) for i in range(0, NUM_PAIRS, chunk_size)]
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        kept = [model(batch.images[rows], batch.token_ids[rows]) for rows in parts]
    for number, rows in enumerate(parts):
        out = model(batch.images[rows], batch.token_ids[rows])
        features = [
            torch.cat([(out if place == number else k)[name] for place, k in enumerate(kept)])
            for name in ("image_features", "text_features")
        ]
        compare(*features, logit_scale=out["logit_scale"], logit_bias=out["logit_bias"]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_open_clips_accumulation_multiplies_the_scales_gradient_by_the_parts_and_ours_does_not(tmp_path, loss):
    model, batch = model_of(tmp_path, NATIVE | {"patch_dropout": 0.0}, None, loss), batch_of(16)
    whole, ours = (outcome(model, batch, loss, size)[1] for size in (None, 2))
    theirs = open_clips_accumulation(model, batch, loss, 2)
    name = "visual.conv1.weight"
    torch.testing.assert_close(theirs[name], whole[name], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(theirs["logit_scale"], 5 * whole["logit_scale"], rtol=1e-8, atol=0)
    torch.testing.assert_close(ours["logit_scale"], whole["logit_scale"], rtol=1e-10, atol=0)
    if loss == "siglip":
        torch.testing.assert_close(theirs["logit_bias"], 5 * whole["logit_bias"], rtol=1e-8, atol=0)
        torch.testing.assert_close(ours["logit_bias"], whole["logit_bias"], rtol=1e-10, atol=0)


def test_a_scaled_backward_scales_every_gradient_once(tmp_path):
    """As half precision needs it: Accelerate multiplies what it is given, here by 1024."""
    model, batch = ready(model_of(tmp_path, NATIVE, NOISY, "siglip")), batch_of(16)
    whole = outcome(model, batch, "siglip", None)[1]
    model.zero_grad(set_to_none=True)
    arguments = model, model, LOSSES["siglip"], PREPROCESS, torch.device("cpu"), 3, "negatives", 4
    Stepper(*arguments, backward=lambda loss: (1024 * loss).backward()).forward_backward(batch)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 1024 * whole[name], rtol=1e-10, atol=1e-7, msg=name)


def test_gradients_cross_processes_only_in_the_last_chunk(tmp_path):
    model, batch = ready(model_of(tmp_path, NATIVE, None, "clip")), batch_of(16)
    inside, passes = [], []

    class NoSync:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *error):
            inside.pop()

    def backward(loss):
        passes.append(bool(inside))
        loss.backward()

    arguments = model, model, LOSSES["clip"], PREPROCESS, torch.device("cpu"), 3, "negatives", 3
    Stepper(*arguments, backward=backward, no_sync=NoSync).forward_backward(batch)
    assert passes == [True, True, True, False]


def test_chunks_that_cannot_be_exact_are_refused(tmp_path):
    model = model_of(tmp_path, NATIVE, NOISY, "clip")
    with pytest.raises(ValueError, match=r"chunk_size 3 does not hold whole routing groups of 2, as visual.*mlp has"):
        check_chunk_size(3, model)
    check_chunk_size(4, model)
    check_chunk_size(None, model)
    normalised = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="0 normalises over the batch, which chunk_size cannot cut"):
        check_chunk_size(3, normalised)
    check_chunk_size(3, normalised.requires_grad_(False))
