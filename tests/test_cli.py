"""The command line: every verb end to end on a tiny model, every mistake one line."""

import json
import shutil

import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.usefixtures("working_folder")


@pytest.fixture(scope="module")
def run_folder(tiny_settings, tmp_path_factory):
    """A trained tiny model."""
    from softmoe_clip.config import TrainConfig
    from softmoe_clip.data_pipelines.strict import load_strict
    from softmoe_clip.training.loop import train

    out = tmp_path_factory.mktemp("cli") / "run"
    return train(load_strict(TrainConfig, {"out": str(out), **tiny_settings}, ["steps=2"]))


@pytest.fixture(scope="module")
def suite(scenes, tmp_path_factory):
    file = tmp_path_factory.mktemp("suite") / "suite.yaml"
    file.write_text(f"root: {scenes}\ntasks:\n  - {{kind: retrieval, name: scenes, data: val}}\n")
    return file


@pytest.fixture(scope="module")
def embeddings(run_folder, scenes, tmp_path_factory):
    """An index over held-out scenes."""
    from softmoe_clip.models.store import load_encoder
    from softmoe_clip.search.embed import embed
    from softmoe_clip.search.index import index

    out = tmp_path_factory.mktemp("embeddings") / "out"
    embed(load_encoder(run_folder, "cpu"), f"{scenes}/val", out, model_name=str(run_folder))
    index(out)
    return out


MISTAKES = {
    "an unknown verb": (["trainn"], "trainn"),
    "an unknown option": (["train", "{yaml}", "--plann"], "--plan"),
    "a missing argument": (["pack"], "'source'"),
    "a scale beyond numbers": (["train", "{yaml}", "model.init_logit_scale=1000"], "must be between -80 and 80"),
    "a bias that is no number": (["train", "{yaml}", "model.init_logit_bias=.nan"], "must be between -80 and 80"),
    "a bias that the loss has no use for": (
        ["train", "{yaml}", "loss=clip", "model.init_logit_bias=1"],
        "for loss=siglip",
    ),
    "captions of no ids": (["train", "{yaml}", "model.context_length=0"], "context_length must be 2 or more"),
    "a seed beyond what is drawn from": (["train", "{yaml}", f"seed={2**64}"], "seed must be 0 to 2**63 - 1, got 1844"),
    "a missing config": (["train", "nowhere.yaml"], "nowhere.yaml"),
    "an empty config name": (["train", ""], "config"),
    "a folder as config": (["train", "."], "config"),
    "an unknown key": (["train", "{yaml}", "optim.lrr=0.1"], "did you mean optim.lr?"),
    "an unknown key of config": (["config", "{yaml}", "modle.arch=x"], "did you mean model"),
    "a wrong type": (["train", "{yaml}", "steps=many"], "steps in the overrides must be a whole number"),
    "no override": (["train", "{yaml}", "steps"], "a.b=value"),
    "no budget": (["train", "{yaml}", "steps=null"], "budget"),
    "missing shards": (["train", "{yaml}", "data.train=nowhere"], "nowhere"),
    "an empty folder as shards": (["train", "{yaml}", "data.train=empty"], "empty"),
    "no tokenizer": (["train", "{yaml}", "tokenizer=nowhere.model"], "nowhere.model"),
    "an unknown architecture": (["train", "{yaml}", "model.arch=SoftMoE-dmo"], "did you mean 'SoftMoE-demo'"),
    "a plan of a schedule that does not fit": (["train", "{yaml}", "optim.warmup=99", "--plan"], "warmup 99"),
    "a run at a URL to start from": (
        ["train", "{yaml}", "init=s3://bucket/run"],
        "init takes a folder of this machine",
    ),
    "a checkpoint at a URL": (
        ["train", "{yaml}", "init=s3://b/run/checkpoints/step_00000004"],
        "not the URL s3://b/run",
    ),
    "a model at a URL": (["eval", "s3://bucket/run", "--suite", "{suite}"], "no model is read from a URL such as s3"),
    "a summary of a URL": (["summary", "s3://bucket/run"], "no model is read from a URL such as s3"),
    "a missing source": (["pack", "nowhere", "out"], "nowhere"),
    "an empty source": (["pack", "empty", "out"], "empty"),
    "missing shards to check": (["check", "nowhere"], "nowhere"),
    "a full folder for the stats": (["stats", "nowhere", "half"], "half exists and is not empty"),
    "missing captions": (["train-tokenizer", "nowhere", "tokenizer.model"], "nowhere"),
    "a tokenizer as a folder": (["train-tokenizer", "nowhere", "empty"], "empty is a folder: give the file to write"),
    "a missing model": (["eval", "nowhere", "--suite", "{suite}"], "no model at nowhere"),
    "a folder that is no model": (["eval", "empty", "--suite", "{suite}"], "empty is no model folder"),
    "half a model": (["eval", "half", "--suite", "{suite}", "--out", "o.json"], "half/open_clip_model.safetensors"),
    "a missing suite": (["eval", "{run}", "--suite", "nowhere.yaml"], "nowhere.yaml"),
    "a folder for the results": (["eval", "nowhere", "--suite", "{suite}", "--out", "empty"], "empty is a folder"),
    "a file as folder for the results": (
        ["eval", "nowhere", "--suite", "{suite}", "--out", "half/open_clip_config.json/o.json"],
        "half/open_clip_config.json is a file",
    ),
    "no suite": (["eval", "{run}"], "--suite"),
    "an unknown device": (["eval", "{run}", "--suite", "{suite}", "--device", "tpuu"], "device 'tpuu'"),
    "an unknown precision": (["eval", "{run}", "--suite", "{suite}", "--precision", "int3"], "int3"),
    "no batch": (["eval", "{run}", "--suite", "{suite}", "--batch-size", "0"], "batch_size"),
    "missing results": (["compare", "nowhere.json"], "nowhere.json"),
    "nothing to compare": (["compare"], "'results'"),
    "missing shards to embed": (["embed", "{run}", "nowhere", "out"], "nowhere"),
    "no embeddings": (["index", "nowhere"], "nowhere"),
    "no index": (["search", "nowhere", "a star"], "nowhere"),
    "no query": (["search", "{embeddings}"], "query"),
    "no picture": (["search", "{embeddings}", "--image", "nowhere.png"], "nowhere.png"),
    "no hits": (["search", "{embeddings}", "a star", "-k", "0"], "k"),
    "an architecture that nobody knows": (["summary", "SoftMoE-dmo"], "did you mean 'SoftMoE-demo'"),
    "no experts": (["train", "{yaml}", "model.image_moe.num_experts=0"], "at least one expert and one slot"),
    "a layer that is not there": (["train", "{yaml}", "model.image_moe.layers=[7]"], "blocks are 0 to 1"),
    "more slots than memory": (["train", "{yaml}", "model.image_moe.slots_per_expert=1000000000000"], "this machine"),
    "more experts than memory": (["train", "{yaml}", "model.image_moe.num_experts=1000000000000"], "this machine has"),
    "no run to draw": (["plot", "nowhere"], "nowhere holds no run"),
    "no data for the demo": (["demo", "--data", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    softmoe_clip, working_folder, folder_bytes, request, run_folder, name
):
    arguments, told = MISTAKES[name]
    (working_folder / "empty").mkdir()
    shutil.copytree(run_folder / "model", working_folder / "half")
    weights = working_folder / "half/open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    names = {
        "{train}": "train_shards",
        "{yaml}": "tiny_yaml",
        "{suite}": "suite",
        "{run}": "run_folder",
        "{embeddings}": "embeddings",
    }
    arguments = [str(request.getfixturevalue(names[a])) if a in names else a for a in arguments]
    before = folder_bytes(working_folder)
    done = softmoe_clip(*arguments)
    assert done.returncode == 2, done
    assert done.stderr.startswith("softmoe-clip: ")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert done.stdout == ""
    assert folder_bytes(working_folder) == before
    assert sorted(path.name for path in working_folder.iterdir()) == ["empty", "half"]


def test_pictures_become_numbers_and_hits_through_every_verb(
    softmoe_clip, working_folder, scenes, tiny_yaml, tokenizer_file, suite
):
    def answer(*arguments):
        done = softmoe_clip(*arguments)
        assert done.returncode == 0, done
        return done.stdout

    for number, colour in enumerate(("red", "green", "blue", "yellow")):
        (working_folder / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(working_folder / f"pictures/{number}.png")
        (working_folder / f"pictures/{number}.txt").write_text(f"a {colour} wall\na wall that is {colour}\n")
    assert "3 pictures  train" in answer("pack", "pictures", "shards")
    assert "3 samples, 0 findings" in answer("check", "shards/train")

    answer("train-tokenizer", f"{scenes}/train", "tokenizer.model", "--vocab-size", "100")
    assert (working_folder / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()

    assert "num_experts: 4" in answer("config", tiny_yaml)
    assert "lr: 0.25" in answer("config", tiny_yaml, "optim.lr=0.25")
    plan = answer("train", tiny_yaml, "out=run", "--plan")
    assert "image tower, parameters" in plan
    assert "full shuffle" in plan
    assert "expected time" in plan
    assert not (working_folder / "run").exists()
    answer("train", tiny_yaml, "out=run", "steps=2")

    assert "recall@1" in answer("eval", "run", "--suite", suite, "--out", "first.json")
    answer("eval", "run/model", "--suite", suite, "--out", "second.json")
    first, second = (json.loads((working_folder / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first["metrics"] == second["metrics"]
    assert (first["meta"]["model"], second["meta"]["model"]) == ("run", "run/model")
    compared = answer("compare", "first.json", "second.json")
    assert "first" in compared
    assert "second" in compared

    answer("embed", "run", f"{scenes}/val", "embeddings")
    assert "embeddings" in answer("index", "embeddings")
    answer("index", "embeddings", "--out", "elsewhere")
    found = json.loads(answer("search", "embeddings", "a red star", "-k", "3", "--json"))
    assert len(found) == 3
    assert {"score", "key", "caption", "row"} <= found[0].keys()
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
    assert found[0]["caption"] in answer("search", "embeddings", "a red star", "-k", "1")
    (working_folder / "elsewhere/meta.json").unlink()  # as in an index of clip-retrieval's
    again = answer("search", "elsewhere", "a red star", "-k", "3", "--json", "--model", "run")
    assert json.loads(again) == found
    by_picture = json.loads(answer("search", "embeddings", "--image", "pictures/0.png", "-k", "2", "--json"))
    assert len(by_picture) == 2


def test_processes_that_cannot_find_each_other_are_refused_in_one_line(
    softmoe_clip, working_folder, tiny_yaml, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = softmoe_clip("train", tiny_yaml)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "2 processes were launched (WORLD_SIZE) but cannot find each other" in done.stderr
    assert "accelerate launch --multi_gpu --num_processes 2" in done.stderr
    assert not list(working_folder.iterdir())


def test_a_process_without_a_gpu_of_its_own_is_refused_in_one_line(
    softmoe_clip, working_folder, tiny_yaml, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    done = softmoe_clip("train", tiny_yaml)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "process 1 of this machine (LOCAL_RANK, counted from 0) sees 1 GPU(s)" in done.stderr
    assert not list(working_folder.iterdir())


def test_too_little_memory_of_a_gpu_is_one_line_that_says_what_to_change(softmoe_clip, monkeypatch):
    def fails(*arguments):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1.2 GiB "
            "is free. Process 1 has 77.9 GiB memory in use. See documentation for Memory Management"
        )

    monkeypatch.setattr("softmoe_clip.data_pipelines.check.check", fails)
    done = softmoe_clip("check", "shards")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Tried to allocate 2.00 GiB. GPU 0 has" in done.stderr
    assert "chunk_size" in done.stderr
    assert "documentation" not in done.stderr


def test_check_fails_where_samples_are_bad(softmoe_clip, working_folder):
    from softmoe_clip.data_pipelines.shard_writer import ShardWriter

    with ShardWriter("shards") as writer:
        writer.add(b"no picture", "png", ["a caption"])
    done = softmoe_clip("check", "shards")
    assert done.returncode == 1
    assert "000000000" in done.stdout


def test_ctrl_c_is_no_traceback(softmoe_clip, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("softmoe_clip.data_pipelines.check.check", interrupted)
    done = softmoe_clip("check", "shards")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
