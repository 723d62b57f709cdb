"""clip-benchmark's own command on our folders: its numbers are ours."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tars import write_tar

from softmoe_clip import clip_benchmark
from softmoe_clip.clip_benchmark import accuracy, with_defaults
from softmoe_clip.config import ModelConfig, MoEConfig
from softmoe_clip.data_pipelines.tokenizers import SentencePieceTokenizer
from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer
from softmoe_clip.eval.config import SuiteConfig, TaskConfig
from softmoe_clip.eval.suites import run_suite
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import LoadedModel, load_encoder, save, transform_of

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
TEMPLATES = ("{c}", "a photo of a {c} wall", "{c} paint")
OURS = ["--model_type", "softmoe_clip", "--pretrained", ""]


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["eval", "--model", "run"], OURS),
        (["eval", "--model", "a/run", "--output", "o.json"], OURS),
        (["eval", "--model", "ViT-B-32", "--pretrained", "openai"], OURS[:2]),
        (["eval", "--pretrained_model", "ViT-B-32,openai"], OURS[:2]),
        (["eval", "--model", "run", "--model_type", "softmoe_clip"], OURS[2:]),
        (["eval", "--model", "local-dir:a/b", "--model_type=open_clip"], []),
        (["build", "a.json"], []),
        ([], []),
    ],
)
def test_our_model_type_is_the_default_and_nothing_else_changes(given, added):
    assert with_defaults(given) == given + added


def test_a_path_needs_a_name_for_the_result():
    with pytest.raises(ValueError, match="give it one with --output"):
        with_defaults(["eval", "--model", "runs/a", "--dataset", "wds/x"])


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "eval"])
    with pytest.raises(SystemExit) as exit:
        clip_benchmark.main()
    assert exit.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("softmoe-clip: clip-benchmark cannot be used (")
    assert told.endswith("): pip install 'softmoe-clip[benchmark]'\n")
    assert told.count("\n") == 1


def test_accuracy_counts_targets_among_the_largest():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6], [0.3, 0.2, 0.1]])
    assert accuracy(scores, torch.tensor([1, 2, 2]), (1, 2)) == [1 / 3, 2 / 3]


def pictures():
    """Noisy pictures, each mostly of one colour, with their labels."""
    draws = np.random.default_rng(0)
    for label in [*range(len(COLOURS))] * 4:
        picture = np.array(Image.new("RGB", (40, 30), COLOURS[label]), dtype=float) + draws.normal(0, 90, (30, 40, 3))
        bytes_ = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(bytes_, "PNG")
        yield bytes_.getvalue(), label


def write_set(root, members, shards=2):
    """Write the layout of clip-benchmark: test/0.tar, test/1.tar, ... and how many they are."""
    (root / "test").mkdir(parents=True)
    (root / "test/nshards.txt").write_text(f"{shards}\n")
    for shard in range(shards):
        samples = list(enumerate(members))[shard::shards]
        named = [(f"s{number:07d}.{name}", data) for number, sample in samples for name, data in sample.items()]
        write_tar(root / f"test/{shard}.tar", named)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A labelled and a captioned set."""
    folder = tmp_path_factory.mktemp("sets")
    write_set(folder / "walls", [{"png": data, "cls": str(label).encode()} for data, label in pictures()])
    (folder / "walls/classnames.txt").write_text("\n".join(COLOURS) + "\n")
    (folder / "walls/zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    captions = [
        f"a {COLOURS[label]} wall {'very ' * (number // len(COLOURS))}old\nwall {number}"
        for number, (_, label) in enumerate(pictures())
    ]
    captioned = [
        {"png": data, "txt": caption.encode()} for (data, _), caption in zip(pictures(), captions, strict=True)
    ]
    write_set(folder / "captions", captioned)
    (folder / "captions/dataset_type.txt").write_text("retrieval\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder that open_clip cannot load: experts in a native tower and in our text tower, our own tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    texts = [template.format(c=colour) for template in TEMPLATES for colour in COLOURS]
    train_tokenizer([*texts, "wall 0123456789 very old"], folder / "t.model", vocab_size=80)
    tokenizer = SentencePieceTokenizer(folder / "t.model", 12)
    towers = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 80,
            "width": 16,
            "heads": 2,
            "layers": 2,
            "softmoe_text": {"padding": "mask"},
        },
    }
    (folder / "tiny.json").write_text(json.dumps(towers))
    moe = MoEConfig(num_experts=3)
    config = ModelConfig(str(folder / "tiny.json"), moe, moe)
    sizes = (tokenizer.vocab_size, 12, tokenizer.eos_id)
    torch.manual_seed(3)  # it knows some colours by chance
    model = create_model(config, sizes[0], sizes[1], eos_id=sizes[2]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save(LoadedModel(model, tokenizer, transform_of(model), folder_config(config, *sizes)), folder / "model")
    return folder / "model"


def run(*arguments, folder, environment):
    command = [sys.executable, "-m", "softmoe_clip.clip_benchmark", "eval", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_commands_numbers_are_those_of_our_own_eval(sets, model, tmp_path, process_environment):
    both = ["--model", model, "--no_amp", "--num_workers", 0, "--batch_size", 5]
    for name, task in (("walls", []), ("captions", ["--task", "zeroshot_retrieval", "--recall_k", 1, 5, 10])):
        data = ["--dataset", f"wds/{name}", "--dataset_root", sets / name, "--output", f"{name}.json"]
        done = run(*both, *data, *task, folder=tmp_path, environment=process_environment)
        assert done.returncode == 0, done.stderr
    walls, captions = (json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("walls", "captions"))
    suite = SuiteConfig(
        (
            TaskConfig("zero_shot", "walls", "walls/test", "walls/zeroshot_classification_templates.txt"),
            TaskConfig("retrieval", "captions", "captions/test"),
        ),
        root=str(sets),
    )
    ours = run_suite(load_encoder(model, "cpu"), suite).metrics
    theirs = {
        "zero_shot/walls/top1": walls["acc1"],
        "zero_shot/walls/top5": walls["acc5"],
        "zero_shot/walls/mean_per_class": walls["mean_per_class_recall"],
    }
    for k in (1, 5, 10):
        # Theirs are named after what is found, ours after what is asked and what is found.
        theirs[f"retrieval/captions/text_to_image/recall@{k}"] = captions[f"image_retrieval_recall@{k}"]
        theirs[f"retrieval/captions/image_to_text/recall@{k}"] = captions[f"text_retrieval_recall@{k}"]
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
    assert 0 < walls["acc1"] < 1
    assert 0 < captions["image_retrieval_recall@5"] < 1


@pytest.mark.slow
def test_a_missing_model_and_missing_data_are_one_line(sets, model, tmp_path, process_environment):
    for name, arguments in (
        ("no/such/run", ["--model", "no/such/run", "--dataset_root", sets / "walls"]),
        ("nowhere", ["--model", model, "--dataset_root", "nowhere"]),
    ):
        more = ["--dataset", "wds/walls", "--output", "o.json", "--quiet"]
        done = run(*arguments, *more, folder=tmp_path, environment=process_environment)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("softmoe-clip: ")
        assert name in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
