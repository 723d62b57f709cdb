"""DataConfig: plain defaults, and one sentence for what cannot be."""

import subprocess
import sys

import pytest

from softmoe_clip.data_pipelines.config import DataConfig, SourceConfig


def test_defaults_are_the_soft_moe_recipe():
    assert DataConfig(train="shards") == DataConfig("shards", None, "random", (0.05, 1.0), False, 2)
    assert DataConfig(train="shards", crop_scale=[0.5, 1]).crop_scale == (0.5, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ""}, "data.train is empty"),
        ({"caption": "last"}, "data.caption must be random or first"),
        ({"crop_scale": (0.0, 1.0)}, "data.crop_scale"),
        ({"crop_scale": (0.5, 0.4)}, "data.crop_scale"),
        ({"crop_scale": (0.5, 1.1)}, "data.crop_scale"),
        ({"crop_scale": (0.5,)}, "data.crop_scale"),
        ({"crop_scale": (float("nan"), 1.0)}, "data.crop_scale"),
        ({"num_workers": -1}, "data.num_workers"),
        ({"train": ["a", ""]}, "data.train is empty"),
        ({"train": []}, "data.train is empty"),
        ({"train": 3}, "data.train must be a folder or a pattern, or a list of them, got 3"),
        ({"train": [{"shards": "a"}, "b"]}, r"data.train mixes .*: write 'b' as \{shards: b\}"),
        ({"train": [{"shards": "a", "weigth": 2}]}, "unknown key weigth .* did you mean weight"),
        ({"train": [{"weight": 2}]}, "shards is missing"),
        ({"train": [{"shards": "a", "weight": 0}]}, "weight must be above 0, got 0.0 for a"),
        ({"train": [{"shards": "a", "weight": "much"}]}, "weight in the config must be a number"),
        ({"cache_gib": 0}, "data.cache_gib must be above 0"),
        ({"window": -1}, "data.window must be a number of shards"),
        ({"augment": "flip"}, "data.augment must be crop or none"),
        ({"augment": "none", "flip": True}, "pictures cannot be mirrored"),
        ({"image_features": "embeddings"}, "set data.augment=none"),
    ],
)
def test_impossible_values_name_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"train": "shards", **changes})


def test_sources_are_shards_with_weights():
    assert DataConfig(train="a").sources == (SourceConfig("a", 1.0),)
    assert DataConfig(train=["a", "b"]).sources == (SourceConfig(("a", "b"), 1.0),)
    mixed = DataConfig(train=[{"shards": "a", "weight": 2}, {"shards": ["b", "c"]}])
    assert mixed.sources == mixed.train == (SourceConfig("a", 2.0), SourceConfig(("b", "c"), 1.0))


def test_omegaconf_takes_it_as_a_structure():
    from omegaconf import OmegaConf

    tree = OmegaConf.merge(OmegaConf.structured(DataConfig(train="x")), {"crop_scale": [0.2, 1.0], "flip": True})
    assert OmegaConf.to_object(tree) == DataConfig(train="x", crop_scale=(0.2, 1.0), flip=True)


def test_the_module_needs_no_torch():
    code = "import sys, softmoe_clip.data_pipelines.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
