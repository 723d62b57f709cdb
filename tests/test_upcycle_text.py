"""Upcycling the text tower, too: what keeps its function, what the cosine of captions is, which towers refuse."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tiny_bert import write_bert

from softmoe_clip.config import ModelConfig
from softmoe_clip.data_pipelines.samples import read_pair
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.tokenizers import load_tokenizer
from softmoe_clip.models.comparison import SENTENCES
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import LoadedModel, load, save, transform_of
from softmoe_clip.models.upcycle import upcycle
from softmoe_clip.moe import SoftMoE
from softmoe_clip.moe.install import tower_blocks
from softmoe_clip.moe.shared import SharedExpert

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
SIZES = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
BIDIRECTIONAL = SIZES | {"no_causal_mask": True, "pool_type": "last"}
TOWERS = {
    "ours, masked": {"text_cfg": SIZES | {"softmoe_text": {"pool": "last", "padding": "mask"}}},
    "ours, attended, MAP": {"text_cfg": SIZES | {"softmoe_text": {"pool": "map", "padding": "attend"}}},
    "open_clip's": {"text_cfg": BIDIRECTIONAL | {"proj_bias": True}, "custom_text": True},
    "open_clip's, spread out": {"text_cfg": BIDIRECTIONAL, "quick_gelu": True},
}


def dense(folder, tokenizer_file, **model_cfg):
    """Write a dense model with the tokenizer of the scenes; nothing in it stands where it starts."""
    (folder / "Dense.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION} | model_cfg))
    config, tokenizer = ModelConfig(str(folder / "Dense.json")), load_tokenizer(tokenizer_file, 12)
    arguments = (config, tokenizer.vocab_size, 12)
    torch.manual_seed(0)
    model = create_model(*arguments, eos_id=tokenizer.eos_id).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    written = folder_config(*arguments, tokenizer.eos_id)
    save(LoadedModel(model, tokenizer, transform_of(model), written), folder / "dense")
    return str(folder / "dense")


@pytest.fixture(scope="module", params=TOWERS.values(), ids=TOWERS)
def source(request, tmp_path_factory, tokenizer_file):
    return dense(tmp_path_factory.mktemp("source"), tokenizer_file, **request.param)


@pytest.fixture(scope="module")
def ours(tmp_path_factory, tokenizer_file):
    return dense(tmp_path_factory.mktemp("ours"), tokenizer_file, **TOWERS["ours, masked"])


def text_embeddings(folder, captions):
    loaded = load(folder)
    with torch.inference_mode():
        return loaded.model.encode_text(loaded.tokenizer(captions)).double()


@pytest.mark.parametrize("mode", ["copy", "noise", "shared", "centroids"])
def test_the_folder_gives_the_text_embeddings_that_were_compared(source, scenes, tmp_path, mode):
    val = str(scenes / "val")
    done = upcycle(source, tmp_path / "out", 3, "1", mode, pictures=val, text=True)
    shards = ShardSet.open(val)
    captions = [read_pair(shards.read(number)).captions[0] for number in range(len(shards))]
    if mode == "centroids":  # the others are those it was fitted to
        captions = captions[::2]
    before, after = (text_embeddings(folder, captions) for folder in (source, tmp_path / "out"))
    cosines = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    assert done.text.mean == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert done.text.least == pytest.approx(cosines.min().item(), abs=1e-6)
    assert done.text.measured_on == f"{len(captions)} captions of {val}"
    assert (done.text.least >= 0.9999) == (mode == "shared")
    assert (done.image.least >= 0.9999) == (mode == "shared")


def test_both_towers_hold_experts_and_the_folder_says_so(source, tmp_path):
    upcycle(source, tmp_path / "out", 3, [1], "shared", slots_per_expert=2, text=True)
    after = load(tmp_path / "out")
    for tower, key in (("visual", "image_moe"), ("text", "text_moe")):
        first, second = (block.mlp for block in tower_blocks(getattr(after.model, tower)))
        assert not isinstance(first, SharedExpert)
        assert isinstance(second.routed, SoftMoE)
        assert second.routed.slots == (3, 2)
        written = after.config["softmoe"][key]
        assert (written["num_experts"], written["shared_expert"], written["layers"]) == (3, True, [1])


def test_each_tower_keeps_its_own_activation(ours, tmp_path):
    upcycle(ours, tmp_path / "out", 2, text=True)
    written = load(tmp_path / "out").config["softmoe"]
    assert (written["image_moe"]["activation"], written["text_moe"]["activation"]) == ("gelu", "gelu_tanh")


@pytest.mark.parametrize("mode", ["copy", "shared", "centroids"])
def test_in_an_upcycled_tower_padding_still_changes_nothing(ours, scenes, tmp_path, mode):
    upcycle(ours, tmp_path / "out", 2, "0-1", mode, pictures=str(scenes / "val"), text=True)
    loaded = load(tmp_path / "out")
    token_ids = loaded.tokenizer(["a red circle"])
    length = int((token_ids[0] == loaded.tokenizer.eos_id).nonzero()[0]) + 1
    with torch.inference_mode():
        whole, cut = loaded.model.encode_text(token_ids), loaded.model.encode_text(token_ids[:, :length])
    torch.testing.assert_close(whole, cut)


def test_without_captions_sentences_of_our_own_are_compared(ours, tmp_path):
    done = upcycle(ours, tmp_path / "noise", 2, mode="shared", text=True)
    assert done.text.measured_on == f"{len(SENTENCES)} sentences of our own, for want of captions"
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "pictures/a.png")
    done = upcycle(ours, tmp_path / "bare", 2, mode="shared", pictures=str(tmp_path / "pictures"), text=True)
    assert done.image.measured_on == f"1 pictures of {tmp_path / 'pictures'}"
    assert "of our own" in done.text.measured_on
    (tmp_path / "pictures/a.txt").write_text("nothing to see\n")
    done = upcycle(ours, tmp_path / "captioned", 2, mode="shared", pictures=str(tmp_path / "pictures"), text=True)
    assert done.text.measured_on == f"1 captions of {tmp_path / 'pictures'}"


def test_the_verb_prints_both_cosines(softmoe_clip, ours, tmp_path):
    done = softmoe_clip("upcycle", ours, tmp_path / "out", "--num-experts", 2, "--mode", "shared", "--text")
    assert done.returncode == 0, done
    assert "image embeddings before and after, cosine: mean 1.0000, least 1.0000" in done.stdout
    assert "text embeddings before and after, cosine: mean 1.0000, least 1.0000" in done.stdout


@pytest.mark.parametrize("model_cfg", [{}, {"custom_text": True}], ids=["spread out", "custom_text"])
def test_a_causal_tower_refuses_with_one_line_and_nothing_is_written(softmoe_clip, tokenizer_file, tmp_path, model_cfg):
    source = dense(tmp_path, tokenizer_file, text_cfg=SIZES, **model_cfg)
    done = softmoe_clip("upcycle", source, tmp_path / "out", "--num-experts", 2, "--text")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "that is causal: every slot mixes all tokens of a caption" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Dense.json", "dense"]


def test_a_transformers_tower_refuses(tmp_path, tokenizer_file):
    write_bert(tmp_path / "bert")
    text_cfg = {"hf_model_name": str(tmp_path / "bert"), "hf_tokenizer_name": str(tmp_path / "bert")}
    text_cfg |= {"hf_pooler_type": "mean_pooler", "context_length": 12}
    config = ModelConfig(str(tmp_path / "Bert.json"))
    (tmp_path / "Bert.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text_cfg}))
    model = create_model(config)
    tokenizer = load_tokenizer(tmp_path / "bert", 12)
    save(LoadedModel(model, tokenizer, transform_of(model), folder_config(config)), tmp_path / "dense")
    with pytest.raises(ValueError, match="a text tower of transformers'"):
        upcycle(str(tmp_path / "dense"), tmp_path / "out", 2, text=True)
    assert not (tmp_path / "out").exists()


def test_a_tower_that_holds_experts_refuses_more_of_them_in_other_blocks(ours, tmp_path):
    upcycle(ours, tmp_path / "both", 2, [1], text=True)
    with pytest.raises(ValueError, match=r"the image tower of .*both holds MoE layers already"):
        upcycle(str(tmp_path / "both"), tmp_path / "out", 2, [0], text=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_its_tokenizer_is_one_sentence(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "dense")
    for file in (tmp_path / "dense").glob("*tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"ids up to 49,407 and the text tower knows \d+: copy the tokenizer's files"):
        upcycle(str(tmp_path / "dense"), tmp_path / "out", 2, text=True)
    assert not (tmp_path / "out").exists()


def test_too_few_captions_for_centroids_are_one_sentence(ours, scenes, tmp_path):
    with pytest.raises(ValueError, match=r"centroids need as many tokens, and .* were seen: give more pictures, with"):
        upcycle(ours, tmp_path / "out", 150, [1], "centroids", 2, pictures=str(scenes / "val"), text=True)
    assert not (tmp_path / "out").exists()


def test_one_caption_for_centroids_is_too_few(ours, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (90 * number, 40, 80)).save(tmp_path / f"pictures/{number}.png")
    (tmp_path / "pictures/0.txt").write_text("a dark picture")
    with pytest.raises(ValueError, match=r"^one caption is too few: give two or more, since half of them are compared"):
        upcycle(ours, tmp_path / "out", 2, [1], "centroids", 1, pictures=str(tmp_path / "pictures"), text=True)
    assert not (tmp_path / "out").exists()
