"""What upcycling starts from: tags of open_clip's, folders that its users have, SigLIP towers, ViTs of timm's."""

import json

import open_clip
import pytest
import timm
import torch
from open_clip.push_to_hf_hub import save_for_hf
from PIL import Image
from safetensors.torch import save_file
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from tiny_bert import write_tokenizer

from softmoe_clip.models.store import load
from softmoe_clip.models.upcycle import upcycle
from softmoe_clip.training.build import run_tokenizer

MEAN, STD = [0.4, 0.3, 0.2], [0.3, 0.2, 0.1]
NATIVE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "vit_upcycled_siglip",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 10,
        "vocab_size": 60,
        "hf_tokenizer_name": "somebody/some-tokenizer",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 32,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
CAPTIONS = ["A photo of a RED dog, the house.", "a_blue cat"]
default_cfgs = {}  # timm looks for it here; the weights' place is known when the tests run


def register(name, file, **arguments):
    """Make a small ViT known to timm, pretrained weights and all."""

    def entry(pretrained=False, **overrides):
        return build_model_with_cfg(VisionTransformer, name, pretrained, **(TIMM | arguments | overrides))

    cfg = {"file": str(file), "input_size": (3, 32, 32), "mean": tuple(MEAN), "std": tuple(STD)}
    cfg |= {"interpolation": "bicubic", "first_conv": "patch_embed.proj", "classifier": "head", "num_classes": 10}
    default_cfgs.update(generate_default_cfgs({name: cfg}))
    entry.__name__ = name
    globals()[name] = register_model(entry)


def shaken(model):
    """Move every parameter off its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def siglip_tower(tmp_path_factory):
    """A small tower as SigLIP's: pooled by attention, no class token."""
    file = tmp_path_factory.mktemp("siglip") / "weights.safetensors"
    register("vit_upcycled_siglip", file, global_pool="map", class_token=False)
    torch.manual_seed(0)
    save_file(shaken(timm.create_model("vit_upcycled_siglip")).state_dict(), file)


def write_words(folder):
    """Tokenizer files of BERT's kind."""
    write_tokenizer(folder)


def write_pieces(folder):
    """Tokenizer files of T5's kind, SigLIP's: sentencepiece, an end token that is also the padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁photo", "▁of", "▁red", "▁dog"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.mark.parametrize("write_words", [write_words, write_pieces], ids=["words", "sentencepiece"])
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_a_siglip_folder_that_open_clip_wrote_keeps_tokenizer_and_preprocessing(
    siglip_tower, tmp_path, write_words, weights
):
    write_words(tmp_path / "words")
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path / "words"), 10, clean="canonicalize")
    torch.manual_seed(0)
    model = shaken(open_clip.CustomTextCLIP(**{k: v for k, v in SIGLIP.items() if k != "custom_text"}))
    preprocess = {"size": 32, "mode": "RGB", "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    open_clip.set_model_preprocess_cfg(model, preprocess | {"resize_mode": "squash", "fill_color": 0})
    save_for_hf(model, tokenizer, SIGLIP, tmp_path / "source", safe_serialization=weights == "safetensors")

    done = upcycle(f"local-dir:{tmp_path / 'source'}", tmp_path / "out", 3, mode="shared", text=True)
    assert done.image.least >= 0.9999
    assert done.text.least >= 0.9999
    after = load(tmp_path / "out")
    assert torch.equal(after.tokenizer(CAPTIONS), tokenizer(CAPTIONS))
    assert torch.equal(after.tokenizer(["a photo of a red dog the house"])[0], tokenizer(CAPTIONS)[0])
    assert {key: after.preprocess_cfg[key] for key in preprocess} == preprocess | {"size": (32, 32)}
    picture = Image.effect_noise((50, 40), 60).convert("RGB")
    expected = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'source'}")[2](picture)
    assert torch.equal(after.transform(picture), expected)
    for folder in ("source", "out", "words"):  # a run that goes on with it reads the same ids, whichever is named
        assert torch.equal(run_tokenizer(str(tmp_path / folder), SIGLIP["text_cfg"])(CAPTIONS), tokenizer(CAPTIONS))
    assert torch.equal(after.model.logit_bias, model.logit_bias)
    torch.testing.assert_close(after.model.encode_image(expected[None]), model.encode_image(expected[None]))


def test_a_foreign_weights_file_cut_in_half_is_one_sentence_that_names_it(tmp_path):
    model = open_clip.CLIP(**NATIVE)
    config = {"model_cfg": NATIVE, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    file = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(model.state_dict(), file)
    load(tmp_path)
    whole = file.read_bytes()
    for size in (len(whole) // 2, 100, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"open_clip_pytorch_model\.bin") as error:
            load(tmp_path)
        assert "\n" not in str(error.value)


@pytest.fixture
def hub_repository(tmp_path, monkeypatch):
    """A repository of the hub as it lies in the cache: the small SigLIP image tower beside CLIP's words."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache/models--somebody--a-clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    model_cfg = SIGLIP | {"text_cfg": NATIVE["text_cfg"] | {"layers": 2, "no_causal_mask": True}}
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": MEAN, "std": STD, "resize_mode": "squash"}}
    (snapshot / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = shaken(open_clip.CustomTextCLIP(**{k: v for k, v in model_cfg.items() if k != "custom_text"}))
    save_file(model.state_dict(), snapshot / "open_clip_model.safetensors")
    return snapshot


def test_a_model_on_the_hub_is_upcycled(siglip_tower, hub_repository, tmp_path):
    done = upcycle("hf-hub:somebody/a-clip", tmp_path / "out", 3, mode="shared", text=True)
    assert min(done.image.least, done.text.least) >= 0.9999
    assert load(tmp_path / "out").preprocess_cfg["mean"] == MEAN


def test_a_model_on_the_hub_without_weights_or_preprocessing_is_one_sentence(siglip_tower, hub_repository, tmp_path):
    config = json.loads((hub_repository / "open_clip_config.json").read_text())
    (hub_repository / "open_clip_config.json").write_text(json.dumps({"model_cfg": config["model_cfg"]}))
    with pytest.raises(ValueError, match="has no preprocess_cfg with mean, std: it can't be guessed"):
        upcycle("hf-hub:somebody/a-clip", tmp_path / "out", 3)
    (hub_repository / "open_clip_config.json").write_text(json.dumps(config))
    (hub_repository / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot get the model hf-hub:somebody/a-clip: .*weights"):
        upcycle("hf-hub:somebody/a-clip", tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
def test_a_tag_of_open_clips_brings_architecture_activation_and_preprocessing(tmp_path, monkeypatch, quick_gelu):
    name = f"NativeTagged{quick_gelu}"
    (tmp_path / f"{name}.json").write_text(json.dumps(NATIVE))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    model = shaken(open_clip.CLIP(**NATIVE, quick_gelu=quick_gelu))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    tag = {"file": str(tmp_path / "weights.safetensors"), "mean": MEAN, "std": STD, "resize_mode": "squash"}
    tag |= {"interpolation": "bilinear", "quick_gelu": quick_gelu}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"mine": tag})

    done = upcycle(f"{name}:mine", tmp_path / "out", 3, mode="shared")
    assert done.image.least >= 0.9999
    after = load(tmp_path / "out")
    assert after.config["model_cfg"] == NATIVE | ({"quick_gelu": True} if quick_gelu else {})
    assert after.config["softmoe"]["image_moe"]["activation"] == ("quick_gelu" if quick_gelu else "gelu")
    assert (after.preprocess_cfg["mean"], after.preprocess_cfg["resize_mode"]) == (MEAN, "squash")
    assert torch.equal(after.tokenizer(CAPTIONS), open_clip.get_tokenizer(name)(CAPTIONS))
    with torch.inference_mode():
        expected = model.encode_text(after.tokenizer(CAPTIONS))
        assert torch.equal(after.model.encode_text(after.tokenizer(CAPTIONS)), expected)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_a_vit_of_timms_brings_weights_pooling_and_preprocessing_and_gets_a_text_tower(tmp_path, pool):
    name = f"vit_upcycled_{pool}"
    register(name, tmp_path / "weights.safetensors", global_pool=pool)
    torch.manual_seed(0)
    trunk = shaken(timm.create_model(name))
    save_file(trunk.state_dict(), tmp_path / "weights.safetensors")
    done = upcycle(f"timm:{name}", tmp_path / "out", 3, mode="shared")
    assert done.image.least >= 0.9999
    after = load(tmp_path / "out")
    assert after.preprocess_cfg["mean"] == MEAN
    picture = torch.randn(2, 3, 32, 32)
    trunk.reset_classifier(0)
    with torch.inference_mode():
        torch.testing.assert_close(after.model.encode_image(picture), trunk(picture))
        assert after.model.encode_text(after.tokenizer(CAPTIONS)).shape == (2, 64)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("timm:vit_tiny_patch16_242", "did you mean 'vit_tiny_patch16_224'"),
        ("timm:plain_vit_demo_patch8_64", "plain_vit_demo_patch8_64"),
        ("timm:resnet50", "cannot put MoE layers into a ResNet"),
        ("timm:swin_tiny_patch4_window7_224", "cannot put MoE layers into a SwinTransformer"),
    ],
)
def test_a_timm_name_without_weights_or_blocks_is_one_sentence(source, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        upcycle(source, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
