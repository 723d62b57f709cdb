"""LiT from cached features: the same losses and weights as with the frozen tower in the loop."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from softmoe_clip.data_pipelines.images import decode_rgb
from softmoe_clip.data_pipelines.samples import read_pair
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.models.store import load_encoder
from softmoe_clip.models.trunk import check_features
from softmoe_clip.search.embed import embed
from softmoe_clip.search.index import index
from softmoe_clip.training.build import build, run_picture
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

    def make(*overrides, precision="float32", **options):
        run = train(tiny_config(f"out={tmp_path / 'start'}", "steps=1", "optim.warmup=1", *overrides))
        shards, out = tiny_config(*overrides).data.train, tmp_path / "features"
        embed(load_encoder(run, "cpu", precision), shards, out, model_name=str(run), features="trunk", **options)
        return [*overrides, f"init={run}", "data.augment=none"]

    return make


@pytest.fixture
def timm_architecture(architecture_file, tmp_path):
    file = tmp_path / "timm.json"
    file.write_text(json.dumps(json.loads(architecture_file.read_text()) | {"vision_cfg": TIMM}))
    return [f"model.arch={file}", "model.image_moe=null"]


@pytest.mark.parametrize("tower", ["open_clip", "timm", "coca"])
def test_cached_features_give_the_losses_and_weights_of_the_frozen_tower(
    tower, start, timm_architecture, coca_file, tiny_config, tmp_path
):
    coca = [f"model.arch={coca_file}", "model.image_moe=null"]
    settings = start(*{"open_clip": [], "timm": timm_architecture, "coca": coca}[tower])
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


@pytest.fixture
def refused(tiny_config, tmp_path):
    """Return the one sentence that refuses a LiT run before it is begun."""

    def sentence(*overrides):
        with pytest.raises(ValueError, match=r"^data\.image_features: ") as error:
            train(tiny_config(*overrides, 'freeze=["^visual"]', f"out={tmp_path / 'run'}"))
        assert not (tmp_path / "run").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    return sentence


def repacked(shards, out, left_out=()):
    """Pack pictures again, all or but some of them."""
    with ShardWriter(out) as writer:
        for number in sorted(set(range(len(shards))) - set(left_out)):
            members = shards.read(number).members
            extension = "png" if "png" in members else "jpg"
            writer.add(members[extension], extension, members["txt"].decode().splitlines())


def test_features_belong_to_the_pictures_wherever_these_lie(start, refused, tiny_config, tmp_path):
    good = ShardSet.open(tiny_config().data.train)
    here, there = tmp_path / "shards", tmp_path / "moved"
    repacked(good, here)
    settings = [*start(f"data.train={here}"), f"data.image_features={tmp_path / 'features'}"]
    here.rename(there)
    train(
        tiny_config(*settings, f"data.train={there}", 'freeze=["^visual"]', "steps=2", f"out={tmp_path / 'moved_run'}")
    )
    repacked(good, here, left_out=[20])
    assert "other shards than data.train names" in refused(*settings)
    assert "embed MODEL SHARDS" in refused(*settings)


def test_damaged_folders_are_named_before_the_run_is_begun(start, refused, tmp_path):
    settings = start(rows_per_file=25)
    damaged = tmp_path / "damaged"

    def cut(file):
        file.write_bytes(file.read_bytes()[:-1000])

    def one_row_less(file):
        np.save(file, np.load(file)[:-1])

    def meta_without(name):
        def change(file):
            meta = json.loads(file.read_text())
            del meta[name]
            file.write_text(json.dumps(meta))

        return change

    def without_samples(file):
        pq.write_table(pa.table({"key": ["a"] * 25}), file)

    def backwards(file):
        pq.write_table(pq.read_table(file)[::-1], file)

    for name, change in (
        ("img_emb/img_emb_0002.npy", one_row_less),
        ("img_emb/img_emb_0001.npy", cut),
        ("img_emb/img_emb_0001.npy", lambda file: file.write_bytes(b"")),
        ("img_emb/img_emb_0000.npy", lambda file: file.unlink()),
        ("metadata/metadata_0000.parquet", cut),
        ("metadata/metadata_0001.parquet", without_samples),
        ("metadata/metadata_0002.parquet", lambda file: file.unlink()),
        ("metadata", shutil.rmtree),
        ("metadata", lambda folder: backwards(folder / "metadata_0002.parquet")),
        ("meta.json", lambda file: file.write_text("{")),
        ("meta.json", lambda file: file.write_text("[]")),
        ("meta.json", meta_without("fingerprint")),  # as features were before it was written down
        ("meta.json", meta_without("rows_per_file")),
    ):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(tmp_path / "features", damaged)
        change(damaged / name)
        sentence = refused(*settings, f"data.image_features={damaged}")
        assert str(damaged / name) in sentence, sentence
        assert "embed MODEL SHARDS" in sentence, sentence


def test_rows_in_another_order_are_refused(start, refused, tmp_path):
    settings = [*start(), f"data.image_features={tmp_path / 'features'}"]
    file = tmp_path / "features/img_emb/img_emb_0000.npy"
    rows = np.load(file)
    for order in (np.arange(len(rows))[::-1], np.r_[0, 2 : len(rows), 1], np.r_[0 : len(rows) - 2, -1, -2]):
        np.save(file, rows[order])
        assert "made by another image tower" in refused(*settings)


def test_features_of_pictures_that_are_routed_together_are_refused(start, refused, tmp_path):
    grouped = "model.image_moe={router: tokens_choice, num_experts: 2, group_size: 4}"
    settings = [*start(grouped), grouped, f"data.image_features={tmp_path / 'features'}"]
    assert "routes 4 pictures together (group_size)" in refused(*settings)


def test_features_in_half_precision_are_those_of_the_tower(start, tiny_config, tmp_path):
    settings = [*start(precision="bf16", dtype="float16"), f"data.image_features={tmp_path / 'features'}"]
    config = tiny_config(*settings, 'freeze=["^visual"]')
    shards, loaded = ShardSet.open(config.data.train), build(config)
    features = run_picture(config, loaded, shards)
    images = [decode_rgb(read_pair(shards.read(number)).image) for number in range(len(shards))]
    rows = torch.stack([features(b"", number, None) for number in range(len(shards))])
    check_features(loaded, images, rows, "features")
    for number in range(1, len(shards)):  # and those of any other picture are not
        with pytest.raises(ValueError, match="not in the order"):
            check_features(loaded, images[:1], rows[number : number + 1], "features")


def test_a_branch_takes_the_features_of_its_own_frozen_tower(start, tiny_config, tmp_path):
    settings = [*start("seed=7"), "seed=0", f"data.image_features={tmp_path / 'features'}", 'freeze=["^visual"]']
    trunk = train(tiny_config(*settings, "steps=4", f"out={tmp_path / 'trunk'}"))
    branch = [*settings, f"init={trunk}/checkpoints/step_00000004", f"out={tmp_path / 'branch'}"]
    train(tiny_config(*branch, "steps=5"))
    shutil.rmtree(trunk)
    shutil.rmtree(tmp_path / "start")
    assert losses(train(tiny_config(*branch, "steps=6")))[1:]  # a run that goes on needs neither


def test_a_branch_refuses_the_features_of_another_tower(start, refused, tiny_config, tmp_path):
    start()
    trunk = train(tiny_config("seed=7", "steps=2", f"out={tmp_path / 'trunk'}"))
    point = [f"init={trunk}/checkpoints/step_00000002", "data.augment=none"]
    assert "made by another image tower" in refused(*point, f"data.image_features={tmp_path / 'features'}")


def test_trunk_features_are_no_embeddings_to_search(start, tmp_path):
    start()
    assert not (tmp_path / "features/text_emb").exists()
    with pytest.raises(ValueError, match="holds trunk features"):
        index(tmp_path / "features")
