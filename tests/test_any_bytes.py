"""File names need not be UTF-8, and captions in JSON may hold half a letter: they become text, and no crash."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest
from colour_model import COLOURS, ColourModel, colour_encoder, picture, tokenizer, transform
from tars import write_tar
from tiny_bert import write_tokenizer

from softmoe_clip.data_pipelines.tokenizers import SentencePieceTokenizer, TransformersTokenizer, open_clip_tokenizer
from softmoe_clip.eval.config import SuiteConfig, TaskConfig
from softmoe_clip.eval.results import load_results
from softmoe_clip.eval.suites import run_suite
from softmoe_clip.search.embed import embed
from softmoe_clip.search.index import index
from softmoe_clip.search.query import Hit, open_index, print_hits, search, thumbnails

LOADED = SimpleNamespace(model=ColourModel(), tokenizer=tokenizer, transform=transform, config=None)


@pytest.fixture
def shards(tmp_path):
    members = []
    for place, colour in enumerate(COLOURS):
        key = f"caf\udce9{place}"
        caption = json.dumps({"caption": f"a {colour} \ud83d square"}).encode()
        members += [(f"{key}.png", picture(colour)), (f"{key}.json", caption), (f"{key}.cls", str(place).encode())]
    write_tar(tmp_path / "shards/0.tar", [*members, ("bad\udce9.png", b"no picture"), ("bad\udce9.cls", b"0")])
    return str(tmp_path / "shards")


def test_pictures_of_any_name_are_embedded_found_and_read_back(shards, tmp_path):
    embed(colour_encoder(), shards, tmp_path / "emb")
    opened = open_index(index(tmp_path / "emb"))
    (hit,) = hits = search(opened, "something blue \udce9", k=1, loaded=LOADED)
    assert (hit.key, hit.caption) == ("caf?2", "a blue ? square")
    assert thumbnails(opened, hits) == [picture("blue")]


def test_results_are_written_whatever_the_keys_and_class_folders_are_called(shards, tmp_path):
    for place, colour in enumerate(COLOURS):
        folder = os.path.join(os.fsencode(tmp_path / "classes"), f"{colour} caf".encode() + b"\xe9")
        os.makedirs(folder)
        with open(os.path.join(folder, b"%d.png" % place), "wb") as file:
            file.write(picture(colour))
    tasks = TaskConfig("zero_shot", "a", shards, classnames=list(COLOURS)), TaskConfig("retrieval", "b", shards)
    folders = TaskConfig("zero_shot", "c", str(tmp_path / "classes"))
    results = run_suite(colour_encoder(), SuiteConfig((*tasks, folders)))
    assert [results.metrics[f"zero_shot/{name}/top1"] for name in "ac"] == [1, 1]
    results.save(tmp_path / "r.json")
    saved = load_results(tmp_path / "r.json")
    assert saved.meta["tasks"]["zero_shot/a"]["skipped"][0]["key"] == "bad?"
    assert saved.details["zero_shot/c"]["per_class"][0]["name"] == "black caf?"


def test_every_tokenizer_reads_half_a_surrogate_as_a_question_mark(tokenizer_file, tmp_path):
    write_tokenizer(tmp_path / "bert")
    theirs = open_clip_tokenizer(9), TransformersTokenizer(tmp_path / "bert", 9)
    for make in (SentencePieceTokenizer(tokenizer_file, 9), *theirs):
        assert make(["caf\udce9"]).tolist() == make(["caf?"]).tolist()


HITS = [Hit(0.5, "a", "猫 🐱 \x1b[31mred\x07", 0, "0.tar")]


def test_no_caption_steers_the_terminal(capsys):
    print_hits(HITS)
    assert capsys.readouterr().out == " 0.500  0.tar:a  猫 🐱 ?[31mred?\n"


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "猫 🐱"), ("latin-1", r"\u732b \U0001f431")])
def test_hits_are_printed_on_terminals_of_any_encoding(monkeypatch, encoding, shown):
    for as_json in (False, True):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace"))
        print_hits(HITS, as_json)
        sys.stdout.seek(0)
        text = sys.stdout.read()
        assert json.loads(text)[0]["caption"] == HITS[0].caption if as_json else shown in text


def test_the_command_line_prints_names_that_the_terminal_has_no_letters_for(softmoe_clip, working_folder, monkeypatch):
    for name in ("猫", "Käse"):
        os.makedirs(f"pictures/{name}")
        for place, colour in enumerate(COLOURS):
            with open(f"pictures/{name}/{place}.png", "wb") as file:
                file.write(picture(colour))
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), "latin-1"))
    assert softmoe_clip("pack", "pictures", "out").returncode == 0
    out.seek(0)
    assert r"2 classes   Käse, \u732b" in out.read()
