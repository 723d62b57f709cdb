"""Whole image towers against the reference's numbers, and against its mathematics written out in NumPy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference_vit import in_their_names, numpy_tower, read_case, tower_of

GOLDEN = [Path(__file__).parent / "golden" / f"{name}.npz" for name in ("vit_soft_gap_qknorm", "vit_dense_gap_sincos")]


def run(tower, image, cotangent, num_heads):
    """Return block outputs, logits and the gradients of sum(logits * cotangent), named as in a golden file."""
    found = {}
    for i, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda m, inputs, out, i=i: found.update({f"act:encoderblock_{i}": out}))
    tower.norm.register_forward_hook(lambda m, inputs, out: found.update({"act:encoded": out}))
    tower.head.register_forward_pre_hook(lambda m, inputs: found.update({"act:pre_logits": inputs[0]}))
    image = torch.from_numpy(image).double().requires_grad_()
    found["logits"] = tower(image.permute(0, 3, 1, 2))
    (found["logits"] * torch.from_numpy(cotangent)).sum().backward()
    grads = in_their_names({name: p.grad for name, p in tower.named_parameters()}, num_heads)
    found |= {"grad_image": image.grad} | {f"grad:{name}": grad for name, grad in grads.items()}
    return {name: value.detach().numpy() for name, value in found.items()}


def error(ours, theirs):
    return np.abs(ours - theirs).max() / max(1, np.abs(theirs).max())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_whole_towers_equal_the_reference(path):
    config, params, case = read_case(path)
    found = run(tower_of(config, params), case["image"], case["loss_cotangent"], config["encoder"]["num_heads"])
    for name, value in found.items():
        if name in case:
            # Gradients of parameters are kept in float32.
            assert error(value, case[name]) <= (1e-6 if name.startswith("grad:") else 1e-10), name
    kept = {name for name in case if name.startswith(("act:encode", "act:pre", "grad", "logits"))}
    assert kept <= found.keys()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_mathematics_in_numpy_is_the_references(path):
    config, params, case = read_case(path)
    for name, value in numpy_tower(config, params, case["image"]).items():
        assert error(value, case[name]) <= 1e-12, name


@pytest.fixture(scope="module", params=[True, False], ids=["qk_norm", "no_qk_norm"])
def with_map_head(request):
    """A tower with two Soft MoE blocks and attention pooling: config, random parameters, pictures, a cotangent."""
    config, params, case = read_case(GOLDEN[0])
    rng, d, f = np.random.default_rng(0), config["hidden_size"], config["encoder"]["mlp_dim"]
    attention = {
        name.replace("Encoder/encoderblock_0/SelfAttention", "MapHead/MultiHeadDotProductAttention"): value.shape
        for name, value in params.items()
        if name.startswith("Encoder/encoderblock_0/SelfAttention")
    }
    head = {f"MapHead/{name}": shape for name, shape in {
        "probe": (1, 1, d), "LayerNorm/scale": (d,), "LayerNorm/bias": (d,),
        "Mlp/Dense_0/kernel": (d, f), "Mlp/Dense_0/bias": (f,), "Mlp/Dense_1/kernel": (f, d), "Mlp/Dense_1/bias": (d,),
    }.items()}  # fmt: skip
    params = params | {name: rng.normal(size=shape) for name, shape in (attention | head).items()}
    if not request.param:
        params = {name: value for name, value in params.items() if "_ln/" not in name}
    config = config | {
        "classifier": "map",
        "encoder": config["encoder"] | {"attention_qk_norm": request.param},
    }
    return config, params, case["image"], case["loss_cotangent"]


def test_attention_pooling_equals_the_mathematics_in_numpy(with_map_head):
    config, params, image, cotangent = with_map_head
    found = run(tower_of(config, params), image, cotangent, config["encoder"]["num_heads"])
    for name, value in numpy_tower(config, params, image).items():
        assert error(found[name], value) <= 1e-12, name


def test_gradients_through_attention_pooling_equal_central_differences(with_map_head):
    config, params, image, cotangent = with_map_head
    found = run(tower_of(config, params), image, cotangent, config["encoder"]["num_heads"])
    rng = np.random.default_rng(1)
    for name in [name for name in params if name.startswith("MapHead/")] + ["Encoder/encoderblock_1/Moe/Router/mu"]:
        direction = rng.normal(size=params[name].shape)
        loss = [
            (numpy_tower(config, params | {name: params[name] + step * direction}, image)["logits"] * cotangent).sum()
            for step in (1e-5, -1e-5)
        ]
        slope = (found[f"grad:{name}"] * direction).sum()
        assert slope == pytest.approx((loss[0] - loss[1]) / 2e-5, rel=1e-6, abs=1e-7), name
