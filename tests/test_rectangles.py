"""Image towers that take pictures of another height than width, as open_clip allows."""

import json

import pytest

from softmoe_clip.models.onnx import export_onnx
from softmoe_clip.models.store import load
from softmoe_clip.models.upcycle import upcycle
from softmoe_clip.training.loop import train


@pytest.fixture
def settings(architecture_file, tmp_path):
    file = tmp_path / "wide.json"
    arch = json.loads(architecture_file.read_text())
    file.write_text(json.dumps(arch | {"vision_cfg": arch["vision_cfg"] | {"image_size": [32, 48]}}))
    return [f"model.arch={file}", "steps=1", "optim.warmup=0", "model.image_moe=null"]


def test_random_crops_are_squares_and_say_so_before_anything_is_written(tiny_config, settings, tmp_path):
    with pytest.raises(ValueError, match=r"pictures of 32 x 48 pixels, .*: set data\.augment=none"):
        train(tiny_config(*settings))
    assert not (tmp_path / "run").exists()


def test_all_else_takes_rectangles(tiny_config, settings, tmp_path):
    run = train(tiny_config(*settings, "data.augment=none"))
    upcycle(str(run), tmp_path / "experts", num_experts=2)
    loaded = load(tmp_path / "experts")
    assert loaded.picture_size == (32, 48)
    with pytest.raises(ValueError, match="no squares"):
        loaded.image_size  # noqa: B018
    assert max(export_onnx(str(tmp_path / "experts"), tmp_path / "onnx")) < 1e-4
