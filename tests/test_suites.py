"""Suites end to end with a model whose answers are known: it embeds the colour it sees and the colour it reads."""

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.eval.config import SuiteConfig, TaskConfig
from softmoe_clip.eval.encoder import Encoder
from softmoe_clip.eval.suites import load_suite, run_suite

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
CONFIGS = os.path.join(os.path.dirname(__file__), "..", "configs", "suites")


class ColourModel(torch.nn.Module):
    """Embeds a picture as its mean colour, a text as the colour that it names first (all zeros: the grey vector)."""

    def encode_image(self, images):
        return images.mean(dim=(2, 3)) + 1e-3

    def encode_text(self, token_ids):
        colours = torch.tensor([(1, 1, 1), *COLOURS.values()], dtype=torch.float32) + 1e-3
        return colours[token_ids[:, 0]]


def first_colour(texts):
    places = [[text.find(colour) for colour in COLOURS] for text in texts]
    return torch.tensor(
        [[1 + min((p, i) for i, p in enumerate(ps) if p >= 0)[1] if max(ps) >= 0 else 0] for ps in places]
    )


def encoder():
    return Encoder(ColourModel(), first_colour, lambda image: pil_to_tensor(image).float(), batch_size=3)


def picture(colour):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[colour]).save(data, "png")
    return data.getvalue()


@pytest.fixture
def root(tmp_path):
    with ShardWriter(tmp_path / "labelled" / "test") as writer:
        for label, colour in [(0, "red"), (1, "green"), (1, "green"), (2, "green")]:
            writer.add(picture(colour), "png", [], label=label)
    (tmp_path / "labelled" / "classnames.txt").write_text("red\ngreen\nblue\n")
    with ShardWriter(tmp_path / "captioned") as writer:
        for colour in ("red", "green", "blue"):
            writer.add(
                picture(colour),
                "png",
                [f"a {colour} thing", f"this is {colour}"],
                {"false": "white", "group": "to white"},
            )
        writer.add(b"broken", "png", ["a red thing"])
    for name, colour in (("n1", "red"), ("n2", "blue")):
        (tmp_path / "folders" / "val" / name).mkdir(parents=True)
        (tmp_path / "folders" / "val" / name / "1.png").write_bytes(picture(colour))
    listed = [{"index": i, "dir": f"n{i + 1}", "name": name} for i, name in enumerate(["red", "blue"])]
    (tmp_path / "folders" / "classes.json").write_text(json.dumps({"classes": listed}))
    return tmp_path


def suite(root, *tasks):
    return SuiteConfig(tuple(TaskConfig(**task) for task in tasks), root=str(root))


def test_every_kind_of_task_gives_numbers_with_chance_under_the_same_names(root):
    found = run_suite(
        encoder(),
        suite(
            root,
            {"kind": "zero_shot", "name": "shards", "data": "labelled/test"},
            {"kind": "zero_shot", "name": "folders", "data": "folders/val", "templates": ["{c}"]},
            {"kind": "retrieval", "name": "colours", "data": "captioned"},
            {"kind": "relations", "name": "colours", "data": "captioned"},
            {"kind": "counting", "name": "colours", "data": "captioned"},
            {"kind": "negation", "name": "colours", "data": "captioned"},
        ),
        model_name="colour model",
    )
    assert found.metrics.keys() == found.chance.keys()
    assert found.metrics["zero_shot/shards/top1"] == 0.75
    assert found.metrics["zero_shot/shards/mean_per_class"] == pytest.approx(2 / 3)
    assert found.chance["zero_shot/shards/top1"] == pytest.approx(1 / 3)
    assert found.metrics["zero_shot/folders/top1"] == 1
    assert found.metrics["retrieval/colours/image_to_text/recall@1"] == 1
    assert found.metrics["retrieval/colours/text_to_image/recall@1"] == 1
    assert found.chance["retrieval/colours/image_to_text/recall@5"] == 1
    for kind in ("relations", "counting", "negation"):
        assert found.metrics[f"{kind}/colours/accuracy"] == 1
        assert found.chance[f"{kind}/colours/accuracy"] == 0.5
        assert found.metrics[f"{kind}/colours/to white/accuracy"] == 1
    assert found.details["zero_shot/shards"]["per_class"] == [
        {"name": "red", "top1": 1.0, "num_pictures": 1},
        {"name": "green", "top1": 1.0, "num_pictures": 2},
        {"name": "blue", "top1": 0.0, "num_pictures": 1},
    ]
    assert found.meta["model"] == "colour model"
    counts = found.meta["tasks"]["retrieval/colours"]
    assert (counts["num_pictures"], counts["num_captions"]) == (3, 6)
    assert [bad["key"] for bad in counts["skipped"]] == ["000000003"]
    assert json.loads(json.dumps(found.meta)) == found.meta


def test_a_model_that_cannot_tell_is_given_half_of_the_relations(root):
    blind = encoder()
    blind.tokenizer = lambda texts: torch.zeros(len(texts), 1, dtype=torch.long)
    found = run_suite(blind, suite(root, {"kind": "relations", "name": "x", "data": "captioned"}))
    assert found.metrics["relations/x/accuracy"] == 0.5


def test_class_embeddings_are_renormalised_means_of_unit_prompt_embeddings():
    from softmoe_clip.eval.zero_shot import class_embeddings

    found = class_embeddings(encoder(), ["red", "x"], ["{}", "blue {}", "green {}, {}", "white or {}"])
    for classname, colours in (("red", ["red", "blue", "green", "white"]), ("x", ["grey", "blue", "green", "white"])):
        vectors = np.array([COLOURS.get(colour, (1, 1, 1)) for colour in colours]) + 1e-3
        mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(found[["red", "x"].index(classname)], mean / np.linalg.norm(mean), rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "zero_shot", "name": "a", "data": "captioned", "classnames": ["x"]}, "000000000 of .* has no label"),
        ({"kind": "zero_shot", "name": "a", "data": "captioned"}, r"no classnames\.txt"),
        ({"kind": "zero_shot", "name": "a", "data": "labelled/test", "classnames": ["x"]}, "label 2 has no name"),
        ({"kind": "zero_shot", "name": "a", "data": "labelled/test", "classnames": []}, "classnames of a are empty"),
        ({"kind": "zero_shot", "name": "a", "data": "labelled/test", "templates": "simpel"}, "did you mean simple"),
        ({"kind": "retrieval", "name": "a", "data": "labelled/test"}, "000000000 of .* has no caption"),
        ({"kind": "relations", "name": "a", "data": "labelled/test"}, 'no json with "caption" and "false"'),
        ({"kind": "retrieval", "name": "a", "data": "nowhere"}, "nowhere"),
        ({"kind": "retrieval", "name": "a/b", "data": "x"}, "without `/`"),
        ({"kind": "retrieval", "name": "a", "data": "x", "templates": "openai"}, "belong to zero_shot"),
    ],
)
def test_a_task_that_does_not_fit_its_data_is_named(root, task, message):
    with pytest.raises(ValueError, match=message):
        run_suite(encoder(), suite(root, task))


def test_a_typo_in_a_suite_names_the_right_key(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("tasks:\n  - {kind: retrieval, name: x, dta: y}\n")
    with pytest.raises(ValueError, match=r"^unknown key tasks\.0\.dta in .*s\.yaml: did you mean tasks\.0\.data\?$"):
        load_suite(path)
    path.write_text("tasks:\n  - {kind: retrival, name: x, data: y}\n")
    with pytest.raises(
        ValueError, match="must be one of zero_shot, retrieval, relations, counting, negation, got 'retrival'"
    ):
        load_suite(path)
    path.write_text("tasks: []\n")
    with pytest.raises(ValueError, match="at least one task"):
        load_suite(path)
    path.write_text("tasks: [{kind: retrieval, name: x, data: y}, {kind: retrieval, name: x, data: z}]\n")
    with pytest.raises(ValueError, match="two tasks are called retrieval/x"):
        load_suite(path)


def test_paths_start_at_the_root_and_know_the_environment(monkeypatch):
    monkeypatch.setenv("SOFTMOE_TEST_ROOT", "/data")
    place = SuiteConfig((TaskConfig("retrieval", "x", "y"),), root="$SOFTMOE_TEST_ROOT/sets").place
    assert place("a/{0..3}.tar::/b") == "/data/sets/a/{0..3}.tar::/b"
    assert place("$SOFTMOE_TEST_ROOT/c") == "/data/c"
    assert SuiteConfig((TaskConfig("retrieval", "x", "y"),)).place("a/b") == "a/b"


@pytest.mark.parametrize("name", ["scenes", "flickr8k", "small_sets"])
def test_the_suites_that_come_along_are_valid(monkeypatch, name):
    monkeypatch.setenv("SOFTMOE_CLIP_DATA", "/data")
    assert load_suite(os.path.join(CONFIGS, f"{name}.yaml"), ["root=/elsewhere"]).root == "/elsewhere"


@pytest.mark.skipif("SOFTMOE_CLIP_DATA" not in os.environ, reason="SOFTMOE_CLIP_DATA is not set")
def test_real_pictures_are_scored():
    config = load_suite(
        os.path.join(CONFIGS, "small_sets.yaml"), ["tasks=[{kind: zero_shot, name: c, data: cifar10/test}]"]
    )
    eight = Encoder(
        ColourModel(), first_colour, lambda image: pil_to_tensor(image.resize((8, 8))).float(), batch_size=64
    )
    found = run_suite(eight, config)
    assert found.meta["tasks"]["zero_shot/c"]["num_pictures"] == 1000
    assert found.metrics["zero_shot/c/top1"] == pytest.approx(0.1)  # it knows no class name: all ties
