"""What `data.train` may be, as runs: several sources, and remote shards."""

import json

import pytest
from bad_server import bad_server

from softmoe_clip.data_pipelines import fetch
from softmoe_clip.data_pipelines.config import DataConfig
from softmoe_clip.data_pipelines.train_set import in_words, open_train

WEIGHTS = "model/open_clip_model.safetensors"


def test_sources_lie_one_after_the_other_and_keep_their_weights(scenes):
    train, val = f"{scenes}/train", f"{scenes}/val"
    data = DataConfig(train=[{"shards": train, "weight": 3}, {"shards": [val, train]}])
    shards = open_train(data)
    assert len(shards) == 60 + 40 + 60
    assert [source.weight for source in shards.sources] == [3.0, 1.0]
    assert sum(source.num_shards for source in shards.sources) == len(shards.urls)
    assert in_words(data) == f"{train}, {val}, {train}"
    assert shards.read(100).members == shards.read(0).members


def test_a_source_that_is_not_there_is_named(scenes):
    with pytest.raises(ValueError, match="nowhere is not there"):
        open_train(DataConfig(train=[{"shards": f"{scenes}/train"}, {"shards": "nowhere"}]))


@pytest.mark.slow
def test_a_run_on_two_sources_goes_on_to_the_same_weights(tiny_config, scenes, tmp_path):
    from softmoe_clip.training.loop import train

    mixed = f"data.train=[{{shards: {scenes}/train, weight: 2}}, {{shards: {scenes}/val}}]"
    settings = (mixed, "optim.schedule=constant")
    whole = train(tiny_config(*settings, f"out={tmp_path}/whole", "steps=4"))
    for steps in (2, 4):
        run = train(tiny_config(*settings, f"out={tmp_path}/run", f"steps={steps}"))
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=r"data\.train: .*'weight': 2\.0.* then, .*'weight': 1\.0"):
        train(tiny_config(mixed.replace(", weight: 2", ""), f"out={tmp_path}/run", "steps=6"))


@pytest.mark.slow
def test_a_run_on_remote_shards_gives_the_weights_of_one_on_local_ones(tiny_config, scenes, tmp_path, monkeypatch):
    from softmoe_clip.training.loop import train

    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    names = sorted(path.name for path in (scenes / "train").glob("*.tar"))
    local = train(tiny_config(f"out={tmp_path}/local"))
    with bad_server(scenes / "train") as server:
        server.faults = {name: ["half", "hang up"] for name in names}
        urls = json.dumps([f"{server.url}/{name}" for name in names])
        remote = train(tiny_config(f"out={tmp_path}/remote", f"data.train={urls}", f"data.cache={tmp_path}/copies"))
    assert (remote / WEIGHTS).read_bytes() == (local / WEIGHTS).read_bytes()
    assert sorted(path.name for path in (tmp_path / "copies").glob("*/*.tar")) == names
