"""Model folders on the hub: one call uploads them, and what comes back is the same to the last bit."""

import json
import os
import subprocess
import sys

import pytest
import torch
from fake_hub import hub
from PIL import Image

from softmoe_clip.config import ModelConfig, MoEConfig
from softmoe_clip.data_pipelines.tokenizers import SentencePieceTokenizer, open_clip_tokenizer
from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.hub import is_ours
from softmoe_clip.models.store import LoadedModel, load, save, transform_of
from softmoe_clip.models.summary import summary

CAPTIONS = ["a red dog", "a blue cat in front of a house", "two green dogs"]
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2}


def write_model(folder, tokenizer, vision=VISION, text=TEXT, **config):
    folder.mkdir()
    path = folder.with_suffix(".json")
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    config = ModelConfig(str(path), **config)
    sizes = (tokenizer.vocab_size, tokenizer.context_length)
    torch.manual_seed(0)
    model = create_model(config, *sizes, eos_id=tokenizer.eos_id).eval()
    written = folder_config(config, *sizes, tokenizer.eos_id)
    save(LoadedModel(model, tokenizer, transform_of(model), written), folder)


def features(loaded):
    """Embeddings of a picture and of captions; the picture is not square, and larger than the model's."""
    picture = Image.radial_gradient("L").convert("RGB").resize((90, 50))
    with torch.inference_mode():
        image = loaded.model.encode_image(loaded.transform(picture)[None])
        return [image, loaded.model.encode_text(loaded.tokenizer(CAPTIONS))]


# Everything that asks the hub, in one process: the address is read when huggingface_hub is imported.
PROGRAM = """
import json, sys
import torch
from huggingface_hub import HfApi
from test_hub import features
import softmoe_clip
from softmoe_clip.models.summary import summary

torch.set_num_threads(1)
folders, foreign, broken, out = json.loads(sys.argv[1])
found, counts = {}, {}
for name, folder in folders.items():
    HfApi().upload_folder(folder_path=folder, repo_id=f"somebody/{name}")
for name in [*folders, foreign]:
    loaded = softmoe_clip.load(f"hf-hub:somebody/{name}")
    found[name] = [*features(loaded), loaded.config]
    counts[name] = summary(f"hf-hub:somebody/{name}")
for name in broken:
    try:
        softmoe_clip.load(f"hf-hub:somebody/{name}")
    except ValueError as error:
        found[name] = str(error)
found["counts"] = counts
torch.save(found, out)
"""


@pytest.mark.slow
def test_a_folder_is_uploaded_by_one_call_and_comes_back_the_same(tmp_path, process_environment):
    train_tokenizer(CAPTIONS, tmp_path / "t.model", vocab_size=40)
    pieces = SentencePieceTokenizer(tmp_path / "t.model", 8)
    moe = MoEConfig(num_experts=3)
    demo = {"image_size": 64, "timm_model_name": "softmoe_vit_demo_patch8_64", "timm_pool": "avg", "timm_proj": ""}
    ours = {name: tmp_path / name for name in ("trunk", "native", "bpe")}
    write_model(ours["trunk"], pieces, demo)
    masked = TEXT | {"softmoe_text": {"padding": "mask"}}
    write_model(ours["native"], pieces, text=masked, image_moe=moe, text_moe=moe)
    write_model(ours["bpe"], open_clip_tokenizer(12), image_moe=moe)

    # What open_clip's users have on the hub: no file of ours. Without preprocessing nobody may guess it.
    write_model(tmp_path / "foreign", open_clip_tokenizer(12))
    (tmp_path / "foreign/softmoe_tokenizer.json").unlink()
    foreign = {file.name: file.read_bytes() for file in (tmp_path / "foreign").iterdir()}
    settings = json.loads(foreign["open_clip_config.json"])
    del settings["preprocess_cfg"]
    repos = {
        "somebody/foreign": foreign,
        "somebody/guessed": foreign | {"open_clip_config.json": json.dumps(settings).encode()},
        "somebody/empty": {"README.md": b"soon"},
    }
    with hub(repos) as address:
        environment = process_environment | {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "any",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        names = {name: str(folder) for name, folder in ours.items()}
        told = json.dumps([names, "foreign", ["guessed", "empty", "nobody"], str(tmp_path / "found.pt")])
        subprocess.run([sys.executable, "-c", PROGRAM, told], env=environment, check=True)

    found = torch.load(tmp_path / "found.pt")
    for name, folder in {**ours, "foreign": tmp_path / "foreign"}.items():
        *there, config = found[name]
        assert all(map(torch.equal, there, features(load(folder)))), name
        assert found["counts"][name] == summary(str(folder)) | {"model": f"hf-hub:somebody/{name}"}
        assert config == (None if name == "foreign" else load(folder).config)
        assert repos[f"somebody/{name}"] == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "has no preprocess_cfg with mean, std: it can't be guessed" in found["guessed"]
    assert "it has no open_clip_config.json" in found["empty"]
    assert "cannot get the model hf-hub:somebody/nobody" in found["nobody"]
    assert all("\n" not in found[name] for name in ("guessed", "empty", "nobody"))


def test_folders_of_ours_are_told_from_open_clips(tmp_path):
    dense = {"model_cfg": {"text_cfg": {"width": 8}}}
    assert not is_ours(tmp_path, dense)
    assert is_ours(tmp_path, dense | {"softmoe": {}})
    assert is_ours(tmp_path, {"model_cfg": {"text_cfg": {"softmoe_text": {}}}})
    (tmp_path / "softmoe_tokenizer.json").touch()
    assert is_ours(tmp_path, dense)
