"""LiT from cached features: the same losses and weights as with the frozen tower in the loop."""

import json

import pytest
import torch
from safetensors.torch import load_file

from softmoe_clip.models.store import load_encoder
from softmoe_clip.search.embed import embed
from softmoe_clip.search.index import index
from softmoe_clip.training.loop import train

WEIGHTS = "model/open_clip_model.safetensors"
TIMM = {
    "image_size": 64,
    "timm_model_name": "softmoe_vit_demo_patch8_64",
    "timm_pool": "avg",
    "timm_proj": "linear",
}


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def start(tiny_config, tmp_path):
    """Train for a step, embed the training pictures with it; return what settings of a LiT run those are."""

    def make(*overrides):
        run = train(tiny_config(f"out={tmp_path / 'start'}", "steps=1", "optim.warmup=1", *overrides))
        shards = tiny_config(*overrides).data.train
        embed(load_encoder(run, "cpu"), shards, tmp_path / "features", model_name=str(run), features="trunk")
        return [*overrides, f"init={run}", "data.augment=none"]

    return make


@pytest.fixture
def timm_architecture(architecture_file, tmp_path):
    file = tmp_path / "timm.json"
    file.write_text(json.dumps(json.loads(architecture_file.read_text()) | {"vision_cfg": TIMM}))
    return [f"model.arch={file}", "model.image_moe=null"]


@pytest.fixture
def coca_architecture(architecture_file, tmp_path):
    file = tmp_path / "coca.json"
    arch = json.loads(architecture_file.read_text())
    del arch["custom_text"], arch["text_cfg"]["no_causal_mask"], arch["text_cfg"]["pool_type"]
    arch["vision_cfg"]["output_tokens"] = True
    arch["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    arch["multimodal_cfg"] = {"width": 32, "heads": 2, "layers": 1, "context_length": 12}
    file.write_text(json.dumps(arch))
    return [f"model.arch={file}", "model.image_moe=null"]


@pytest.mark.parametrize("tower", ["open_clip", "timm", "coca"])
def test_cached_features_give_the_losses_and_weights_of_the_frozen_tower(
    tower, start, timm_architecture, coca_architecture, tiny_config, tmp_path
):
    settings = start(*{"open_clip": [], "timm": timm_architecture, "coca": coca_architecture}[tower])
    settings.append('freeze=["^visual[.]trunk"]' if tower == "timm" else 'freeze=["^visual"]')
    with_tower = train(tiny_config(*settings, f"out={tmp_path / 'tower'}"))
    cached = train(tiny_config(*settings, f"out={tmp_path / 'cached'}", f"data.image_features={tmp_path / 'features'}"))
    assert losses(cached) == pytest.approx(losses(with_tower), rel=1e-5)
    first, second = (load_file(run / WEIGHTS) for run in (with_tower, cached))
    started = load_file(tmp_path / "start" / WEIGHTS)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)
    if tower == "timm":  # its head is trained beside the text tower
        assert not torch.equal(second["visual.head.proj.weight"], started["visual.head.proj.weight"])
    frozen = [name for name in started if name.startswith("visual.trunk." if tower == "timm" else "visual.")]
    assert frozen
    assert all(torch.equal(second[name], started[name]) for name in frozen)


def test_mistakes_are_named_before_anything_is_written(start, tiny_config, tmp_path):
    settings = start()
    features = f"data.image_features={tmp_path / 'features'}"
    for overrides, message in (
        ([*settings, features], r"need a frozen trunk: set freeze=\[\"\^visual\"\]"),
        (["seed=7", "data.augment=none", 'freeze=["^visual"]', features], "made by another image tower"),
        ([*settings, 'freeze=["^visual"]', "data.image_features=gone"], "no folder that `embed` wrote"),
        ([features], "set data.augment=none with it"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny_config(*overrides, f"out={tmp_path / 'run'}"))
        assert not (tmp_path / "run").exists()


def test_trunk_features_are_no_embeddings_to_search(start, tmp_path):
    start()
    assert not (tmp_path / "features/text_emb").exists()
    with pytest.raises(ValueError, match="holds trunk features"):
        index(tmp_path / "features")
