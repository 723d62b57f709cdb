"""Queries: words or a picture in, the right rows out, and their pictures read back."""

import json
from types import SimpleNamespace

import pytest
from colour_model import COLOURS, ColourModel, colour_encoder, picture, tokenizer, transform, write_colours

from softmoe_clip.search.embed import embed
from softmoe_clip.search.index import index
from softmoe_clip.search.query import hits_json, open_index, print_hits, search, thumbnails

LOADED = SimpleNamespace(model=ColourModel(), tokenizer=tokenizer, transform=transform, config=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("search")
    shards = write_colours(place / "shards", damaged=True)
    embed(colour_encoder(), shards, place / "embeddings")
    return index(place / "embeddings")


@pytest.mark.parametrize("colour", COLOURS)
def test_words_find_their_picture(folder, colour):
    hits = search(folder, f"show me a {colour} thing", k=3, loaded=LOADED)
    assert len(hits) == 3
    assert hits[0].caption == f"a {colour} square"
    assert hits[0].score >= hits[1].score >= hits[2].score


@pytest.mark.parametrize("among", ["images", "captions"])
def test_a_picture_finds_its_like_and_its_words(folder, tmp_path, among):
    (tmp_path / "ask.png").write_bytes(picture("yellow", size=(40, 8)))
    hits = search(folder, image=tmp_path / "ask.png", k=1, loaded=LOADED, among=among)
    assert hits[0].caption == "a yellow square"


def test_pictures_of_hits_come_back_byte_for_byte(folder):
    opened = open_index(folder)
    hits = search(opened, "purple", k=2, loaded=LOADED)
    assert thumbnails(opened, hits)[0] == picture("purple")


def test_pictures_of_changed_shards_are_refused(folder, tmp_path):
    opened = open_index(folder)
    other = write_colours(tmp_path / "others", shard_size=1)
    moved = opened._replace(meta=opened.meta | {"shards": [other]})
    hits = search(opened, "purple", k=1, loaded=LOADED)
    with pytest.raises(ValueError, match="shards changed"):
        thumbnails(moved, hits)


def test_json_holds_the_fields_of_a_hit(folder):
    hits = search(folder, "red", k=2, loaded=LOADED)
    (first, _) = json.loads(hits_json(hits))
    assert first == {
        "score": hits[0].score,
        "key": "000000000",
        "caption": "a red square",
        "row": 0,
        "shard": "00000.tar",
    }


def test_printed_hits_are_one_line_each(folder, capsys):
    hits = search(folder, "green", k=2, loaded=LOADED)
    print_hits(hits)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].split(maxsplit=2)[1:] == ["00000.tar:000000001", "a green square"]


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        ({}, "either"),
        ({"query": "   "}, "either"),
        ({"query": "red", "image": "x.png"}, "either"),
        ({"query": "red", "k": 0}, "k must be"),
        ({"image": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_mistakes_are_one_sentence(folder, ask, named):
    with pytest.raises(ValueError, match=named):
        search(folder, loaded=LOADED, **ask)


def test_a_file_that_is_no_picture_is_named(folder, tmp_path):
    (tmp_path / "notes.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.jpg"):
        search(folder, image=tmp_path / "notes.jpg", loaded=LOADED)


def test_a_model_of_another_width_is_refused(folder):
    class Wide(ColourModel):
        def encode_text(self, token_ids):
            return super().encode_text(token_ids).repeat(1, 2)

    with pytest.raises(ValueError, match="width 8"):
        search(folder, "red", loaded=SimpleNamespace(model=Wide(), tokenizer=tokenizer, transform=transform))


def test_an_index_without_a_model_name_asks_for_one(folder):
    with pytest.raises(ValueError, match="does not name the model that made it: give that with --model MODEL"):
        search(folder, "red")
    with pytest.raises(ValueError, match="no model at nowhere"):
        search(folder, "red", model="nowhere")
