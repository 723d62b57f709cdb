"""A short training learns from captions that are true, and nothing from shuffled ones: the numbers measure learning."""

import subprocess
import sys
from math import sqrt

import pytest
from omegaconf import OmegaConf

from softmoe_clip.config import find_config
from softmoe_clip.data_pipelines.samples import all_captions
from softmoe_clip.data_pipelines.scenes import write_scenes
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer
from softmoe_clip.eval.results import load_results

pytestmark = pytest.mark.slow

NUM_VAL, NUM_CLASSES = 300, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes at the demo's size, and a tokenizer."""
    folder = tmp_path_factory.mktemp("learning")
    write_scenes(folder / "shards", num_train=2000, num_val=NUM_VAL)
    train_tokenizer(all_captions(ShardSet.open(str(folder / "shards/train"))), folder / "tokenizer.model")
    suite = OmegaConf.load(find_config("configs/suites/scenes.yaml"))
    OmegaConf.save(OmegaConf.merge(suite, {"root": str(folder / "shards")}), folder / "suite.yaml")
    return folder


def trained(folder, environment, *overrides):
    """Train configs/demo.yaml for a minute; return the metrics of its suite."""
    run = folder / "_".join(["run", *overrides])
    settings = {
        "out": run,
        "data.train": folder / "shards/train",
        "data.val": "null",
        "tokenizer": folder / "tokenizer.model",
        "steps": 200,
        "optim.warmup": 40,
    }
    train = ["train", "configs/demo.yaml", *(f"{key}={value}" for key, value in settings.items()), *overrides]
    evaluate = ["eval", run, "--suite", folder / "suite.yaml", "--out", run / "numbers.json"]
    for command in (train, evaluate):
        subprocess.run([sys.executable, "-m", "softmoe_clip", *map(str, command)], check=True, env=environment)
    return load_results(run / "numbers.json")


def test_true_captions_teach_and_shuffled_ones_give_chance(folder, process_environment):
    learnt = trained(folder, process_environment)
    shuffled = trained(folder, process_environment, "data.shuffle_captions=true")
    for name, num_independent in {
        "retrieval/scenes/text_to_image/recall@10": NUM_VAL,
        "retrieval/scenes/image_to_text/recall@10": NUM_VAL,
        "zero_shot/scenes/top5": NUM_CLASSES,  # the pictures of a class look alike
    }.items():
        chance = learnt.chance[name]
        noise = sqrt(chance * (1 - chance) / num_independent)
        assert learnt.metrics[name] > chance + 8 * noise, (name, learnt.metrics)
        assert abs(shuffled.metrics[name] - chance) < 4 * noise, (name, shuffled.metrics)
