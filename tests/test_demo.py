"""The demo end to end, with a small configs/demo.yaml in the working folder; and what it says of bad data."""

import colorsys
import json
import shutil

import pytest
from omegaconf import OmegaConf
from PIL import Image

from softmoe_clip.data_pipelines.pack import pack
from softmoe_clip.data_pipelines.scenes import train_sample, write_scenes
from softmoe_clip.data_pipelines.scenes_held_out import long_samples, val_samples
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.tokenizers import load_tokenizer
from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer
from softmoe_clip.demo import MOST_PASSES, claim, demo_config, demo_suite, held_out_shards, make_shards


def write_pictures(folder, count):
    """Coloured pictures with captions."""
    folder.mkdir()
    for number in range(count):
        colour = tuple(int(255 * part) for part in colorsys.hsv_to_rgb(number / count, 0.8, 0.9))
        Image.new("RGB", (48, 40), colour).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a wall painted in colour number {number}\n")
    return folder


@pytest.fixture
def small_demo(tiny_settings, tmp_path, monkeypatch):
    """A working folder whose own configs/demo.yaml is that of a tiny run: `configs/...` is looked for there first."""
    (tmp_path / "configs").mkdir()
    settings = {"out": "run", **tiny_settings, "eval": {"every": 3}}
    (tmp_path / "configs/demo.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ones_own_pictures_become_a_model_an_index_and_a_report(softmoe_clip, small_demo):
    write_pictures(small_demo / "pictures", 24)
    done = softmoe_clip("demo", "--data", "pictures", "--out", "out")
    assert done.returncode == 0, done.stderr
    out = small_demo / "out"
    for made in ("shards/train", "shards/val", "tokenizer.model", "run/model", "run/metrics.jsonl", "embeddings"):
        assert (out / made).exists(), made
    assert json.loads((out / "results.json").read_text())["metrics"]
    report = (out / "report.html").read_text()
    assert "<img" in report
    assert "finds" in done.stdout
    assert str(out.relative_to(small_demo) / "report.html") in done.stdout

    again = softmoe_clip("demo", "--data", "pictures", "--out", "out")
    assert again.returncode == 0, again.stderr
    assert "is finished (6 steps); nothing to do" in again.stderr

    write_pictures(small_demo / "others", 3)
    refused = softmoe_clip("demo", "--data", "others", "--out", "out")
    assert refused.returncode == 2
    assert "out holds the demo of" in refused.stderr


@pytest.mark.slow
def test_scenes_become_all_that_the_demo_shows(softmoe_clip, small_demo):
    done = softmoe_clip("demo")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((small_demo / "demo/results.json").read_text())["metrics"]
    assert {name.split("/")[0] for name in metrics} == {"zero_shot", "retrieval", "relations", "counting", "negation"}
    assert "'a striped red star' finds" in done.stdout


BAD = {
    "missing": lambda folder: None,
    "empty": lambda folder: folder.mkdir(),
    "no captions": lambda folder: [file.unlink() for file in write_pictures(folder, 3).glob("*.txt")],
    "no pictures": lambda folder: [file.unlink() for file in write_pictures(folder, 3).glob("*.png")],
    "no picture that decodes": lambda folder: [f.write_text("x") for f in write_pictures(folder, 3).glob("*.png")],
    "one picture": lambda folder: write_pictures(folder, 1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_line_and_no_folder_is_left(softmoe_clip, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    BAD[name](tmp_path / "mine")
    done = softmoe_clip("demo", "--data", "mine", "--out", "out")
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("softmoe-clip: ")
    assert "mine" in lines[-1] or "00.png" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "out").exists()


def write_table(folder, *splits, text="a wall"):
    """Pictures listed in a table that names a split for each."""
    write_pictures(folder, len(splits))
    rows = [f"{number:02}.png,{text},{split}\n" for number, split in enumerate(splits)]
    (folder / "captions.csv").write_text("image,caption,split\n" + "".join(rows))


SPLITS_OF_A_SOURCE = {
    "validation": (["train"] * 6 + ["validation"] * 3, {"train": 6, "val": 3}, "val"),
    "other words": (["Training"] * 6 + ["dev"] * 2 + ["testing"], {"train": 6, "val": 2, "test": 1}, "test"),
    "unnamed rows": ([""] * 6 + ["valid"] * 3, {"train": 6, "val": 3}, "val"),
}


@pytest.mark.parametrize("name", SPLITS_OF_A_SOURCE)
def test_the_splits_of_a_source_are_found_under_other_names(tmp_path, name):
    splits, counts, held_out = SPLITS_OF_A_SOURCE[name]
    write_table(tmp_path / "mine", *splits)
    make_shards(str(tmp_path / "mine"), tmp_path / "out/shards")
    found = {path.name: len(ShardSet.open(str(path))) for path in (tmp_path / "out/shards").iterdir()}
    assert found == counts
    assert held_out_shards(tmp_path / "out").name == held_out


@pytest.mark.parametrize(
    "splits", [["train"] * 9, ["val"] * 9, ["dev"] * 5 + ["test"] * 4, ["train"] * 5 + ["more"] * 4]
)
def test_pictures_are_held_out_where_the_source_holds_out_none_or_all(tmp_path, splits):
    write_table(tmp_path / "mine", *splits)
    make_shards(str(tmp_path / "mine"), tmp_path / "out/shards")
    found = {path.name: set(keys_of(path)) for path in (tmp_path / "out/shards").iterdir()}
    assert found.keys() == {"train", "val"}
    assert len(found["train"]) + len(found["val"]) == 9
    assert held_out_shards(tmp_path / "out").name == "val"


def keys_of(folder):
    shards = ShardSet.open(str(folder))
    return [json.loads(shards.read(index).members["json"])["file_name"] for index in range(len(shards))]


def test_training_pictures_are_never_taken_for_held_out_ones(softmoe_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "mine", "train", "train", "validation")
    (tmp_path / "mine/02.png").write_text("no picture")
    done = softmoe_clip("demo", "--data", "mine", "--out", "out")
    assert done.returncode == 2, done
    assert "too few pictures to train on some and hold out others (02.png: " in done.stderr
    assert not (tmp_path / "out").exists()
    pack("mine", "out/shards")  # as a demo may have left it: train alone
    with pytest.raises(ValueError, match="neither test nor val"):
        held_out_shards(tmp_path / "out")


def test_a_folder_with_other_things_is_left_alone(softmoe_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    done = softmoe_clip("demo", "--out", "out")
    assert done.returncode == 2
    assert "out holds something else than a demo" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("out", ["mine.txt", "mine.txt/deeper"])
def test_a_file_in_place_of_the_folder_is_one_sentence(tmp_path, out):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"mine\.txt is a file: give another folder with --out"):
        claim(tmp_path / out, "scenes")


@pytest.fixture(scope="module")
def twenty_scenes(tmp_path_factory):
    """A demo's folder with few pictures."""
    out = tmp_path_factory.mktemp("twenty")
    write_scenes(out / "shards", num_train=20, num_val=5, num_processes=1)
    return out


def test_few_pictures_make_a_batch_without_repeats_and_a_short_run(twenty_scenes):
    config = demo_config(None, twenty_scenes)
    assert config.batch_size == 20
    assert config.last_step == MOST_PASSES
    assert config.optim.warmup < config.last_step


def test_the_demo_cuts_no_caption_of_a_scene(twenty_scenes):
    context_length = demo_config(None, twenty_scenes).model.context_length
    planned = [train_sample(0, index) for index in range(1200)]
    file = twenty_scenes / "tokenizer.model"
    train_tokenizer([caption for sample in planned for caption in sample.captions], file)
    tokenizer = load_tokenizer(file, 2 * context_length)
    planned += long_samples(0, val_samples(0, 500, set()))
    token_ids = tokenizer([caption for sample in planned for caption in sample.captions])
    longest = int((token_ids != tokenizer.eos_id).sum(1).max())
    assert longest + 1 == context_length  # with the end token; and no place is wasted


def test_ones_own_captions_are_as_long_as_the_architecture_says(twenty_scenes):
    assert demo_config("pictures", twenty_scenes).model.context_length is None


@pytest.mark.parametrize("name", ["set #2: mine", "[a], {b}", "'it\"s' é 🐱"])
def test_the_demo_works_in_a_folder_of_any_name(twenty_scenes, tmp_path, name):
    out = tmp_path / name
    shutil.copytree(twenty_scenes, out)
    config = demo_config(None, out)
    assert (config.out, config.data.val) == (str(out / "run"), str(out / "shards/val"))
    assert demo_suite(None, out).root == str(out / "shards")
