"""What several test files share: a few drawn scenes, a tokenizer for them, the smallest model that has experts."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Shapes in signatures are checked while the tests run: the hook must stand before the package's first import.
CHECKED = ("moe", "models", "training", "data_pipelines.transforms")
install_import_hook([f"softmoe_clip.{name}" for name in CHECKED], "beartype.beartype")

import torch  # noqa: E402

from softmoe_clip.config import TrainConfig  # noqa: E402
from softmoe_clip.data_pipelines.strict import load_strict  # noqa: E402
from softmoe_clip.launch import CPU_MEMORY  # noqa: E402

# Tests are small, more threads would only wait for each other; and bits can be compared only for one number of them.
torch.set_num_threads(1)

TINY_ARCHITECTURE = {
    "embed_dim": 16,
    "custom_text": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 100,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
        "pool_type": "last",
    },
}


def pytest_configure(config):
    """Hide GPUs from all tests but those for them: the others compare bits, and start more processes than GPUs."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Keep progress lines out of what tests capture."""
    monkeypatch.setenv("SOFTMOE_CLIP_QUIET", "1")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder with train (60 scenes), val and long (40), and the other held-out sets."""
    from softmoe_clip.data_pipelines.scenes import write_scenes

    out = tmp_path_factory.mktemp("scenes") / "out"
    write_scenes(out, num_train=60, num_val=40, image_size=32, num_processes=1)
    return out


@pytest.fixture(scope="session")
def damaged_shards(scenes, tmp_path_factory):
    """Twenty pictures, five of them without a caption."""
    from softmoe_clip.data_pipelines.shard_writer import ShardWriter
    from softmoe_clip.data_pipelines.tar_index import ShardSet

    out = tmp_path_factory.mktemp("damaged") / "shards"
    good = ShardSet.open(f"{scenes}/train")
    with ShardWriter(out) as writer:
        for number in range(20):
            members = good.read(number).members
            extension = "png" if "png" in members else "jpg"
            captions = [] if number % 4 == 1 else members["txt"].decode().splitlines()
            writer.add(members[extension], extension, captions)
    return out


@pytest.fixture(scope="session")
def tokenizer_file(scenes, tmp_path_factory):
    """A sentencepiece model of the scenes' captions."""
    from softmoe_clip.data_pipelines.samples import all_captions
    from softmoe_clip.data_pipelines.tar_index import ShardSet
    from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer

    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(all_captions(ShardSet.open(str(scenes / "train"))), file, vocab_size=100)
    return file


@pytest.fixture(scope="session")
def architecture_file(tmp_path_factory):
    """Two towers of one and two blocks, in open_clip's format."""
    file = tmp_path_factory.mktemp("architecture") / "tiny.json"
    file.write_text(json.dumps(TINY_ARCHITECTURE))
    return file


@pytest.fixture(scope="session")
def coca_file(tmp_path_factory):
    """The same two towers, and open_clip's decoder that writes captions."""
    arch = deepcopy(TINY_ARCHITECTURE)
    del arch["custom_text"], arch["text_cfg"]["no_causal_mask"], arch["text_cfg"]["pool_type"]
    arch["vision_cfg"]["output_tokens"] = True
    arch["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    arch["multimodal_cfg"] = {"width": 32, "heads": 2, "layers": 1, "context_length": 12}
    file = tmp_path_factory.mktemp("architecture") / "coca.json"
    file.write_text(json.dumps(arch))
    return file


@pytest.fixture(scope="session")
def tiny_settings(scenes, tokenizer_file, architecture_file):
    """The settings of a run of a few steps, as they stand in a YAML file; `out` is still missing."""
    return {
        "model": {"arch": str(architecture_file), "image_moe": {"num_experts": 4}},
        "data": {"train": str(scenes / "train"), "crop_scale": [0.7, 1.0], "num_workers": 0},
        "tokenizer": str(tokenizer_file),
        "batch_size": 8,
        "steps": 6,
        "log_every": 1,
        "checkpoint_every": 2,
        "optim": {"lr": 0.001, "warmup": 2},
    }


@pytest.fixture
def tiny_config(tiny_settings, tmp_path):
    """Make a TrainConfig of the tiny settings and `a.b=value` overrides; it writes to tmp_path/run."""

    def make(*overrides):
        return load_strict(TrainConfig, {"out": str(tmp_path / "run"), **tiny_settings}, overrides)

    return make


@pytest.fixture(scope="session")
def tiny_yaml(tiny_settings, tmp_path_factory):
    """A config file with the tiny settings, for the command line."""
    from omegaconf import OmegaConf

    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create({"out": "run", **tiny_settings})))
    return file


@pytest.fixture
def process_environment():
    """What a process of its own needs, to compute with the same bits as any other: one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "SOFTMOE_CLIP_QUIET": "1"}


@pytest.fixture
def softmoe_clip(monkeypatch, capsys):
    """Run the command line in this process; return its exit status, stdout and stderr."""
    from softmoe_clip.cli import main

    for name, value in CPU_MEMORY.items():  # else `train` would set this process, pytest, too
        monkeypatch.setenv(name, value)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["softmoe-clip", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        return subprocess.CompletedProcess(arguments, exit.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def folder_bytes():
    """Return every file below a folder with its bytes."""

    def read(folder):
        return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}

    return read


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
