"""Router maps: the weights of the layer itself, laid over the right patches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn

from softmoe_clip.config import MoEConfig
from softmoe_clip.moe.install import install
from softmoe_clip.moe.soft import SoftMoE
from softmoe_clip.report.overlays import (
    draw_router_maps,
    heat_of,
    leader_overlay,
    leaders,
    model_view,
    overlay,
    times_even,
)
from softmoe_clip.report.router_maps import LayerMaps, router_maps, telling_slots

ROWS, COLUMNS = 3, 4
WIDTH = ROWS * COLUMNS + 1


class OneHotTower(nn.Module):
    """Each of 3 x 4 patches is its own direction, behind one class token; slot i of the layer looks for direction i."""

    def __init__(self, scale=200.0):
        super().__init__()
        self.grid_size = (ROWS, COLUMNS)
        self.layer = SoftMoE(WIDTH, num_experts=WIDTH, hidden=4)
        with torch.no_grad():
            self.layer.slot_embed.copy_(torch.eye(WIDTH)[:, :, None])
            self.layer.router_scale.fill_(scale)

    def forward(self, pixels):
        return self.layer(torch.eye(WIDTH).expand(len(pixels), -1, -1)).mean(1)


class Model(nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.visual = tower

    def encode_image(self, pixels):
        return self.visual(pixels)


def to_pixels(picture):
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255


def flat(size=(48, 36), colour=(120, 120, 120)):
    return Image.new("RGB", size, colour)


def test_a_slot_that_takes_one_token_lights_exactly_that_patch():
    (maps,) = router_maps(Model(OneHotTower()), [flat(), flat()], to_pixels)
    assert maps.dispatch.shape == (2, WIDTH, 1, ROWS, COLUMNS)
    for patch in range(ROWS * COLUMNS):
        y, x = divmod(patch, COLUMNS)
        expected = np.zeros((ROWS, COLUMNS))
        expected[y, x] = 1
        np.testing.assert_allclose(maps.dispatch[1, patch + 1, 0], expected, atol=1e-6)
        np.testing.assert_allclose(maps.combine[1, patch + 1], expected, atol=1e-6)
        drawn = np.asarray(overlay(flat(), maps.dispatch[1, patch + 1, 0]), dtype=int).sum(-1)
        light = drawn.reshape(ROWS, 12, COLUMNS, 12).mean((1, 3))
        assert light.argmax() == patch
        far = [light[v, u] for v in range(ROWS) for u in range(COLUMNS) if max(abs(v - y), abs(u - x)) > 1]
        assert max(far) - min(far) < 0.01 * light.max()  # the smooth edge of the glow ends here
        assert max(far) < 0.6 * light.max()
    # Slot 0 takes the class token: nothing of it lies on the picture.
    np.testing.assert_allclose(maps.prefix[:, 0, 0], 1, atol=1e-6)
    assert maps.dispatch[:, 0].max() < 1e-6


def test_a_layer_that_looks_everywhere_alike_stays_dark():
    (maps,) = router_maps(Model(OneHotTower(scale=0.0)), [flat()], to_pixels)
    weights = maps.dispatch[0, 3, 0]
    assert times_even(weights) == pytest.approx(1)
    drawn = np.asarray(overlay(flat(), weights))
    assert (drawn == drawn[0, 0]).all()
    # A map that is a little uneven glows a little: noise is not blown up to full heat.
    weights = np.ones((ROWS, COLUMNS)) / 12
    weights[1, 1] *= 1.05
    assert 0 < heat_of(weights).max() < 0.2


def open_clip_tower(kind):
    import open_clip

    vision = {"image_size": 32, "width": 32, "layers": 2, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    if kind == "timm":
        vision = {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"}
    model = open_clip.CustomTextCLIP(16, vision, text)
    if kind == "timm":
        model.visual.trunk.set_input_size(img_size=(32, 32))
    install(model.visual, MoEConfig(layers=[1], num_experts=3, slots_per_expert=2))
    return model


@pytest.mark.parametrize(("kind", "grid"), [("native", (4, 4)), ("timm", (2, 2))])
def test_maps_are_the_layers_own_routing_and_leave_the_model_as_it_was(kind, grid):
    torch.manual_seed(0)
    model = open_clip_tower(kind).train()
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    seen = []
    layer = next(module for module in model.visual.modules() if isinstance(module, SoftMoE))
    handle = layer.register_forward_hook(lambda layer, args, out: seen.append(layer.route(args[0])))
    (maps,) = router_maps(model, [picture], to_pixels)
    handle.remove()
    assert model.training
    assert not layer._forward_pre_hooks
    assert maps.dispatch.shape == (1, 3, 2, *grid)
    num_patches = grid[0] * grid[1]
    expected = seen[0].dispatch[0, -num_patches:].permute(1, 2, 0).reshape(3, 2, *grid)
    np.testing.assert_allclose(maps.dispatch[0], expected.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(maps.dispatch.sum((-1, -2)) + maps.prefix, 1, atol=1e-5)
    np.testing.assert_allclose(maps.combine.sum(1), 1, atol=1e-5)


def test_a_dense_tower_has_no_maps(tmp_path):
    loaded = SimpleNamespace(model=Model(nn.Linear(4, 4)), transform=to_pixels)
    loaded.model.encode_image = lambda pixels: pixels
    assert router_maps(loaded, [flat()], to_pixels) == []
    with pytest.raises(ValueError, match="no Soft MoE layer"):
        draw_router_maps(loaded, [flat()], tmp_path / "maps.png")


def test_shown_slots_are_sharp_and_unlike_each_other():
    dispatch = np.full((1, 4, 1, 2, 2), 0.25)
    dispatch[0, 1, 0] = [[0.97, 0.01], [0.01, 0.01]]
    dispatch[0, 2, 0] = [[0.96, 0.02], [0.01, 0.01]]
    dispatch[0, 3, 0] = [[0.1, 0.1], [0.1, 0.7]]
    maps = LayerMaps("blocks.1.mlp", dispatch, np.ones((1, 4, 2, 2)) / 4, np.zeros((1, 4, 1)))
    assert telling_slots(maps, 2) == [(1, 0), (3, 0)]
    assert len(set(telling_slots(maps, 9))) == 4


def test_each_patch_takes_the_colour_of_its_leading_expert():
    combine = np.zeros((1, 3, 1, 2))
    combine[0, 2, 0, 0] = combine[0, 1, 0, 1] = 1
    maps = LayerMaps("blocks.0.mlp", np.zeros((1, 3, 1, 1, 2)), combine, np.zeros((1, 3, 1)))
    leader, named = leaders(maps)
    assert leader.tolist() == [[[2, 1]]]
    assert sorted(named) == [1, 2]
    drawn = np.asarray(leader_overlay(flat((20, 10)), leader[0], named))
    assert (drawn[:, :10] == drawn[0, 0]).all()
    assert (drawn[:, 10:] == drawn[0, 19]).all()
    assert (drawn[0, 0] != drawn[0, 19]).any()


@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
def test_the_picture_shown_is_cut_as_the_model_sees_it(mode):
    settings = PreprocessCfg(size=32, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode)
    transform = image_transform_v2(settings, is_train=False)
    across, down = np.meshgrid(np.linspace(0, 255, 160), np.linspace(0, 255, 96))
    picture = Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))
    view = model_view(picture, transform, side=96)
    assert view.size == (96, 96)
    small = np.asarray(view.resize((32, 32), Image.Resampling.BOX), dtype=float) / 255
    seen = transform(picture).permute(1, 2, 0).numpy()
    # The edges of the padding of "longest" are blurred differently at the two sizes.
    assert np.median(np.abs(small - seen)) < 0.01
    assert np.mean(np.abs(small - seen)) < 0.02


def test_the_sheet_is_a_png_with_a_row_per_picture(tmp_path):
    loaded = SimpleNamespace(model=Model(OneHotTower()), transform=to_pixels)
    out = draw_router_maps(loaded, [flat(), flat()], tmp_path / "new/maps.png", num_slots=3, side=60)
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
        assert sheet.size[0] >= 5 * 60
        assert sheet.size[1] >= 2 * 60
