"""What a model costs before it is built: counts, memory, how it loads; the verb, and names that describe no model."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from softmoe_clip.config import ModelConfig, MoEConfig
from softmoe_clip.models.complexity import complexity, num_parameters
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import CONFIG_FILE
from softmoe_clip.models.summary import expert_path_parameters, summary

NATIVE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def native(tmp_path):
    file = tmp_path / "Native.json"
    file.write_text(json.dumps(NATIVE))
    return str(file)


def model_folder(folder, config):
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(folder_config(config)))
    return str(folder)


@pytest.mark.parametrize("name", ["SoftMoE-demo", "PlainViT-demo"])
def test_parameters_are_those_of_the_built_model(name):
    counted, model = summary(name), create_model(ModelConfig(name))
    assert counted["image"]["parameters"] == num_parameters(model.visual)
    assert counted["text"]["parameters"] == num_parameters(model.text)
    assert counted["parameters"] == num_parameters(model)
    assert counted["loads_with"] == "softmoe_clip.plugin"


def test_the_text_tower_of_clips_own_class_is_counted_apart_from_the_image_tower(native):
    counted, model = summary(native), create_model(ModelConfig(native))
    assert isinstance(model, open_clip.CLIP)
    scale = 1
    assert counted["image"]["parameters"] == num_parameters(model.visual)
    assert counted["text"]["parameters"] == num_parameters(model) - num_parameters(model.visual) - scale
    assert counted["loads_with"] == "open_clip"


def test_an_open_clip_architecture_has_the_published_parameters_and_gflops():
    counted = summary("ViT-B-32")  # open_clip's own profile: 87.85 M and 8.82 GFLOP, 63.43 M and 5.96 GFLOP
    assert counted["image"]["parameters"] / 1e6 == pytest.approx(87.85, abs=0.01)
    assert counted["image"]["gflops"] == pytest.approx(8.82, abs=0.01)
    assert counted["text"]["parameters"] / 1e6 == pytest.approx(63.43, abs=0.01)
    assert counted["text"]["gflops"] == pytest.approx(5.96, abs=0.01)
    assert summary("ViT-B-32:openai") == counted | {"model": "ViT-B-32:openai"}


def test_one_experts_path_is_as_long_as_a_dense_tower_with_a_router():
    soft, dense = summary("SoftMoE-demo")["image"], summary("PlainViT-demo")["image"]
    d, moe_blocks, slots = 128, 2, 14 * 4
    assert soft["expert_path_parameters"] == dense["parameters"] + moe_blocks * (d * slots + 1)
    assert dense["expert_path_parameters"] == dense["parameters"]


def test_a_top_k_router_opens_k_paths():
    model = create_model(ModelConfig("SoftMoE-demo"))
    one = expert_path_parameters(model.visual)
    per_expert = 0
    for block in model.visual.trunk.blocks[2:]:
        block.mlp.top_k = 3
        per_expert += num_parameters(block.mlp.experts) // 14
    assert expert_path_parameters(model.visual) == one + 2 * per_expert


def test_memory_is_weights_gradients_moments_and_activations():
    for tower in (summary("SoftMoE-demo")[name] for name in ("image", "text")):
        memory, weights = tower["memory"], 4 * tower["parameters"]
        assert memory["training"] == 4 * weights
        assert weights < memory["inference"] < weights + memory["training_per_example"]


def test_kept_activations_are_what_autograd_saves():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.second(self.first(x).sigmoid())

    cost = complexity(Net(), torch.empty(3, 8))
    # The input, and the sigmoid's output, which the next layer shares; weights are not counted.
    assert cost.kept_bytes == 4 * (3 * 8 + 3 * 16)
    assert cost.largest_bytes == 4 * (3 * 16 + 3 * 16)
    assert cost.macs == 3 * 8 * 16 + 3 * 16 * 4


def test_kept_activations_grow_with_each_block():
    kept = []
    for layers in (1, 2, 3):
        config = json.loads(json.dumps(NATIVE)) | {"custom_text": True}
        visual = open_clip.CustomTextCLIP(
            config["embed_dim"], config["vision_cfg"] | {"layers": layers}, config["text_cfg"]
        ).visual
        kept.append(complexity(visual, torch.empty(1, 3, 32, 32)).kept_bytes)
    assert kept[2] - kept[1] == kept[1] - kept[0] > 0


def test_experts_outside_a_registered_trunk_need_our_load(native, tmp_path):
    folder = model_folder(tmp_path / "model", ModelConfig(native, MoEConfig(num_experts=4)))
    counted, dense = summary(folder), summary(native)
    assert counted["loads_with"] == "softmoe_clip.load"
    assert counted["image"]["parameters"] > dense["image"]["parameters"]
    assert counted["text"] == dense["text"]


def test_our_text_tower_needs_our_load_and_a_dense_router_does_not(native, tmp_path):
    for name in ("SoftMoE-demo-text", "PlainViT-B-16-256-LAION"):
        assert summary(name)["loads_with"] == "softmoe_clip.load"
        with pytest.raises(TypeError, match="softmoe_text"):
            open_clip.create_model(name)
    dense = model_folder(tmp_path / "model", ModelConfig(native, MoEConfig(router="dense")))
    assert summary(dense)["loads_with"] == "open_clip"
    open_clip.create_model(f"local-dir:{dense}", load_weights=False)


def test_run_folders_and_model_folders_are_counted_without_their_weights(tmp_path):
    folder = model_folder(tmp_path / "run" / "model", ModelConfig("SoftMoE-demo"))
    of_name = summary("SoftMoE-demo")
    for name in (folder, str(tmp_path / "run"), f"local-dir:{folder}"):
        assert summary(name) == of_name | {"model": name}


@pytest.mark.parametrize("name", ["coca_base", "RN50", "ViT-B-16-SigLIP", "convnext_base"])
def test_towers_of_every_kind_are_counted(name):
    counted = summary(name)
    assert counted["image"]["gflops"] > 10
    assert counted["text"]["gflops"] > 1


def test_pictures_that_are_not_square_are_counted_too(native, tmp_path):
    squares = summary(native)["image"]
    wide = json.loads(Path(native).read_text())
    wide["vision_cfg"]["image_size"] = [32, 64]
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    found = summary(str(tmp_path / "wide.json"))["image"]
    width = wide["vision_cfg"]["width"]
    assert found["parameters"] == squares["parameters"] + 16 * width  # positions of 16 more patches
    assert found["gflops"] > 1.8 * squares["gflops"]


def test_a_transformers_text_tower_is_counted_from_its_config_alone(native, tmp_path):
    from transformers import BertConfig

    BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    ).save_pretrained(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_proj_type": "linear", "context_length": 8}
    (tmp_path / "Bert.json").write_text(json.dumps(NATIVE | {"text_cfg": text}))
    n, d, f = 8, 16, 32
    block = 4 * n * d * d + 2 * n * n * d + 2 * n * d * f
    assert summary(str(tmp_path / "Bert.json"))["text"]["gflops"] == 2 * (2 * block + d * 16) / 1e9


@pytest.mark.slow
def test_the_largest_model_answers_within_seconds_and_little_memory(process_environment):
    program = (
        "import json, resource\n"
        "from softmoe_clip.models.summary import summary\n"
        "counted = summary('SoftMoE-H-14')\n"
        "after = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([counted['image']['parameters'], after.ru_utime + after.ru_stime, after.ru_maxrss]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=process_environment)
    parameters, cpu_seconds, peak_kib = json.loads(done.stdout)
    assert parameters == 54_139_498_256
    assert cpu_seconds < 60
    assert peak_kib < 2 * 2**20


def test_the_verb_prints_json_or_a_table(softmoe_clip):
    counted = json.loads(softmoe_clip("summary", "SoftMoE-demo", "--json").stdout)
    assert counted == summary("SoftMoE-demo")
    assert {"parameters", "gflops"} <= counted["image"].keys() & counted["text"].keys()
    told = softmoe_clip("summary", "SoftMoE-demo").stdout
    assert f"{counted['image']['parameters']:,}" in told
    assert "after `import softmoe_clip.plugin`" in told
    assert "AdamW" in told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("SoftMoE-H14", "did you mean 'SoftMoE-H-14'"),
        ("ViT-B-16:opneai", "did you mean 'openai'"),
        ("nowhere.json", "cannot read nowhere.json"),
        ("local-dir:nowhere", "nowhere is no model folder"),
        (".", "is no model folder"),
    ],
)
def test_a_name_that_describes_no_model_is_one_line(softmoe_clip, tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    done = softmoe_clip("summary", name)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert done.stdout == ""
