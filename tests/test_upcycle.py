"""Dense towers become Soft MoE towers: experts are the MLPs they replace, and what is left of the function is told."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from softmoe_clip.config import ModelConfig
from softmoe_clip.data_pipelines.tokenizers import open_clip_tokenizer
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import LoadedModel, load, save, transform_of
from softmoe_clip.models.upcycle import block_list, upcycle

NATIVE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def shake(module):
    """Move every parameter off its start, where biases are zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


@pytest.fixture(scope="module", params=["native", "timm"])
def source(request, tmp_path_factory):
    """A folder with a dense model."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "Native.json").write_text(json.dumps(NATIVE))
    config = ModelConfig(str(folder / "Native.json") if request.param == "native" else "PlainViT-demo")
    torch.manual_seed(0)
    sizes = (49408, 8)
    model = shake(create_model(config, *sizes)).eval()
    save(
        LoadedModel(model, open_clip_tokenizer(8), transform_of(model), folder_config(config, *sizes)), folder / "dense"
    )
    return folder / "dense"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def embeddings(loaded, pictures):
    images = torch.stack([loaded.transform(Image.open(file)) for file in sorted(pictures.iterdir())])
    with torch.inference_mode():
        return loaded.model.encode_image(images), loaded.model.encode_text(loaded.tokenizer(["a dog", "two cats"]))


@pytest.mark.parametrize("mode", ["copy", "noise", "shared", "centroids"])
def test_the_folder_loads_and_gives_the_embeddings_that_were_compared(source, pictures, tmp_path, mode):
    done = upcycle(str(source), tmp_path / "out", 3, mode=mode, pictures=str(pictures))
    images, texts = embeddings(load(source), pictures)
    after = load(tmp_path / "out")
    images_after, texts_after = embeddings(after, pictures)
    assert torch.equal(texts, texts_after)
    if mode == "centroids":  # the others are those it was fitted to
        images, images_after = images[::2], images_after[::2]
    cosines = torch.nn.functional.cosine_similarity(images.double(), images_after.double(), dim=-1)
    assert done.image.mean == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert done.image.least == pytest.approx(cosines.min().item(), abs=1e-6)
    assert done.image.measured_on == f"{len(images)} pictures of {pictures}"
    assert after.config["softmoe"]["image_moe"]["shared_expert"] == (mode == "shared")
    if mode == "shared":
        assert done.image.least >= 0.9999
    else:
        assert done.image.mean < 0.9999


def test_without_pictures_the_comparison_says_that_it_saw_noise(source, tmp_path):
    assert "random pixels" in upcycle(str(source), tmp_path / "out", 2, "3", "shared").image.measured_on


def test_shards_are_pictures_too(source, scenes, tmp_path):
    done = upcycle(str(source), tmp_path / "out", 2, [3], "shared", pictures=str(scenes / "val"))
    assert done.image.measured_on == f"40 pictures of {scenes / 'val'}"


@pytest.mark.parametrize("layers", [[1, 3], "last_half"])
def test_layers_are_read_as_people_write_them(layers):
    assert block_list(layers) == layers
    assert block_list("6, 7,9-11") == [6, 7, 9, 10, 11]
    for wrong in ("", "last", "3-", "-1", "3;4", "3-1", "0-99999999999"):
        with pytest.raises(ValueError, match="last_half or block numbers"):
            block_list(wrong)


@pytest.mark.parametrize("layers", [[3], [2]])
def test_upcycling_twice_is_refused_and_nothing_is_written(source, tmp_path, layers):
    for mode in ("copy", "shared"):
        upcycle(str(source), tmp_path / mode, 2, [3], mode)
        with pytest.raises(ValueError, match=r"the image tower of .* holds MoE layers already"):
            upcycle(str(tmp_path / mode), tmp_path / "twice", 2, layers)
    assert not (tmp_path / "twice").exists()


def test_the_same_call_gives_the_same_bytes(source, pictures, tmp_path, folder_bytes):
    for mode in ("noise", "centroids"):
        for out in ("one", "two"):
            upcycle(str(source), tmp_path / mode / out, 2, [3], mode, pictures=str(pictures))
        assert folder_bytes(tmp_path / mode / "one") == folder_bytes(tmp_path / mode / "two")


def test_another_seed_draws_other_slots_and_leaves_all_else_as_it_is(source, tmp_path):
    starts = {}
    for seed in (0, 1):
        upcycle(str(source), tmp_path / str(seed), 2, [3], seed=seed)
        starts[seed] = load(tmp_path / str(seed)).model.state_dict()
    changed = {name for name, value in starts[0].items() if not torch.equal(value, starts[1][name])}
    assert len(changed) == 1
    assert changed.pop().endswith("slot_embed")


def test_a_dense_model_is_never_written_over(source, tmp_path, folder_bytes):
    shutil.copytree(source, tmp_path / "run/model")
    before = folder_bytes(tmp_path)
    for name, out in (("run", "run/model"), ("run/model", "run/model"), ("local-dir:{}", "run/model")):
        name = name.format(tmp_path / out) if "{}" in name else str(tmp_path / name)
        with pytest.raises(ValueError, match="is the dense model itself: choose another folder"):
            upcycle(name, tmp_path / out, 2)
    assert folder_bytes(tmp_path) == before


def test_no_model_that_is_there_is_replaced(source, tmp_path, folder_bytes):
    shutil.copytree(source, tmp_path / "other")
    before = folder_bytes(tmp_path)
    with pytest.raises(ValueError, match="other exists and is not empty: choose another folder or remove it"):
        upcycle(str(source), tmp_path / "other", 2)
    assert folder_bytes(tmp_path) == before


def test_a_model_that_gives_no_numbers_is_refused(source, tmp_path):
    loaded = load(source)
    with torch.no_grad():
        next(loaded.model.visual.parameters()).fill_(torch.nan)
    save(loaded, tmp_path / "damaged")
    with pytest.raises(ValueError, match=r"the embeddings of .*damaged are not finite"):
        upcycle(str(tmp_path / "damaged"), tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_the_verb_prints_the_cosine(softmoe_clip, source, pictures, tmp_path):
    done = softmoe_clip(
        *("upcycle", source, tmp_path / "out", "--num-experts", 2, "--mode", "shared", "--pictures", pictures)
    )
    assert done.returncode == 0, done
    assert "cosine: mean 1.0000, least 1.0000" in done.stdout
    assert f"on 5 pictures of {pictures}" in done.stdout
    told = done.stdout.splitlines()[-1]
    assert f"with init={tmp_path}/out 'model.image_moe={{num_experts: 2" in told
    assert told.endswith("shared_expert: true}'")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--num-experts", 0], "at least one expert"),
        (["--num-experts", 2, "--slots-per-expert", 0], "at least one expert and one slot"),
        (["--num-experts", 10**12], "this machine has"),
        (["--num-experts", 2, "--mode", "moove"], "copy, noise, shared, centroids, got 'moove'"),
        (["--num-experts", 2, "--mode", "centroids"], "give some with --pictures"),
        (["--num-experts", 2, "--layers", "4"], "do not fit this image tower: its blocks are 0 to 3"),
        (["--num-experts", 2, "--slots-per-expert", 10**12], "this machine has"),
        (["--num-experts", 2, "--layers", "a"], "6,7,9-11"),
        (["--num-experts", 2, "--seed", "-1"], "seed must be 0 to 2**63 - 1, got -1"),
        (["--num-experts", 2, "--pictures", "empty"], "no pictures and no shards in empty"),
        (["--num-experts", 2, "--pictures", "damaged"], "damaged/a.jpg: no picture in a known format"),
        ([], "--num-experts"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(softmoe_clip, source, tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/a.jpg").write_bytes(b"no picture")
    done = softmoe_clip("upcycle", source, "out", *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "empty"]
