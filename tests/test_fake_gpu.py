"""Layers, towers and steps on a GPU that is not there: everything on one device, nothing that makes the CPU wait."""

import pytest
import torch
from compiled import ROUTERS, towers
from fake_gpu import DEVICE, autocast, backward, fake_gpu, host_copies, like, moved
from torch import nn

from softmoe_clip.config import LoraConfig, ModelConfig, MoEConfig
from softmoe_clip.data_pipelines.loader import Batch
from softmoe_clip.models.create import create_model
from softmoe_clip.moe import collect_routing
from softmoe_clip.moe.install import LAYERS, new_layer
from softmoe_clip.training.lora import add_adapters, merged_weights
from softmoe_clip.training.losses import LOSSES
from softmoe_clip.training.masks import draw_by_position
from softmoe_clip.training.step import Stepper

PRECISIONS = (None, torch.bfloat16, torch.float16)
VISION = {
    "native": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "patch_dropout": 0.5}
}
VISION["timm"] = {
    "image_size": 64,
    "timm_model_name": "plain_vit_demo_patch8_64",
    "timm_pool": "",
    "timm_proj": "linear",
    "timm_drop": 0.1,
    "timm_drop_path": 0.1,
    "patch_dropout": 0.5,
}
TEXT = {"context_length": 7, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("router", LAYERS)
def test_a_layer_stays_on_its_device_and_routes_in_float32(router, precision):
    config = MoEConfig(router=router, num_experts=3, **ROUTERS.get(router, {"capacity_multiple_of": 4}))
    layer = new_layer(config, 16, 24)
    with fake_gpu():
        moved(layer)
        tokens = torch.randn(2, 5, 16, device=DEVICE, requires_grad=True)
        with autocast(precision), collect_routing() as collected:
            routing, out = layer.route(tokens), layer(tokens)
        (out.float().square().sum() + collected.aux_loss().to(DEVICE)).backward()
        gradients = [tokens.grad, *(parameter.grad for parameter in layer.parameters())]
        numbers = [n for reports in collected.reports.values() for report in reports for n in report.values()]
    assert routing.combine.dtype == torch.float32
    assert out.dtype == (precision or torch.float32)
    assert {tensor.device for tensor in [out, *gradients, *numbers]} == {DEVICE}
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_towers_stay_on_their_device(precision):
    for name, (tower, inputs) in towers().items():
        with fake_gpu():
            moved(tower)
            with autocast(precision), host_copies() as copies:
                out = tower(like(inputs))
            out.float().square().sum().backward()
            assert not copies, name
            assert all(parameter.grad.device == DEVICE for parameter in tower.parameters()), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("duplicates", ["negatives", "masked"])
@pytest.mark.parametrize(("loss", "vision"), [("clip", "native"), ("siglip", "timm")])
def test_a_step_stays_on_its_device_and_waits_for_no_copy(loss, vision, duplicates, chunk_size, precision):
    model = two_towers(VISION[vision], loss)
    with fake_gpu():
        stepper = Stepper(
            UnderAutocast(moved(model).train(), precision),
            model,
            LOSSES[loss],
            {"mean": [0.5] * 3, "std": [0.5] * 3},
            DEVICE,
            seed=1,
            duplicates=duplicates,
            chunk_size=chunk_size,
            backward=backward,
        )
        batch = pairs(6, VISION[vision]["image_size"])
        with host_copies() as copies:
            step = stepper.at_once if chunk_size is None else stepper.in_chunks
            outcome = step(batch, statistics=True)
        assert [copy for copy in copies if copy.waits] == []
        assert {outcome.loss.device, outcome.aux_loss.device} == {DEVICE}
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad or parameter.grad.device == DEVICE, name


def test_weights_that_are_merged_with_adapters_leave_the_gpu():
    model = two_towers(VISION["native"], "clip")
    names = ("visual.transformer.resblocks.1.mlp.experts", "visual.transformer.resblocks.0.mlp.c_fc")
    add_adapters(model, LoraConfig(targets=names), freeze=(), seed=0)
    with fake_gpu():
        merged = merged_weights(moved(model))
        assert {merged[f"{names[0]}.w_in"].device.type, merged[f"{names[1]}.weight"].device.type} == {"cpu"}
        assert merged["visual.conv1.weight"].device == DEVICE


def two_towers(vision: dict, loss: str) -> nn.Module:
    """Make a small model with Soft MoE in its image tower, and draws of every kind."""
    import json
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        text = TEXT | {"softmoe_text": {"padding": "mask"}}
        json.dump({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, file)
        file.flush()
        moe = MoEConfig(router="tokens_choice", num_experts=3, noise_std=1.0, importance_loss=0.1, load_loss=0.1)
        start = -10.0 if loss == "siglip" else None
        model = create_model(ModelConfig(file.name, image_moe=moe, init_logit_bias=start), eos_id=1)
    draw_by_position(model)
    return model


def pairs(number: int, size: int) -> Batch:
    """Make a batch, in the host's memory."""
    ids = torch.arange(number)
    images = torch.zeros(number, 3, size, size, dtype=torch.uint8)
    names = [str(i) for i in range(number)]
    return Batch(images, torch.zeros(number, 7, dtype=torch.long), ids, ids, names, names, [*range(number)], [])


class UnderAutocast(nn.Module):
    """Two towers as Accelerate runs them on a GPU."""

    def __init__(self, towers: nn.Module, precision: torch.dtype | None):
        super().__init__()
        self.towers, self.precision = towers, precision

    def forward(self, images, token_ids):
        with autocast(self.precision):
            return self.towers(images, token_ids)
