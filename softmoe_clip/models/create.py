"""Build two-tower models: open_clip's own classes, with our text tower and Soft MoE layers where asked for."""

import json
import traceback
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path

from torch import nn

from softmoe_clip.config import ModelConfig, MoEConfig
from softmoe_clip.data_pipelines.strict import load_strict
from softmoe_clip.models.starts import start_quickly
from softmoe_clip.models.written import check_sizes

# How new models see pictures, as in the reference: values from -1 to 1, the whole picture squashed into a square.
NEW_MODEL_PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}

# What of a model's preprocessing does not depend on its resolution.
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode", "fill_color")

# The key of text_cfg that asks for our text tower; open_clip refuses a file that has it, rather than misread it.
OUR_TEXT = "softmoe_text"
# What open_clip builds, for a moment, where our text tower goes.
PLACEHOLDER_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


def create_model(
    config: ModelConfig,
    vocab_size: int | None = None,
    context_length: int | None = None,
    output_dict: bool = True,
    eos_id: int | None = None,
) -> nn.Module:
    """Build a new open_clip model with fresh weights, in train mode, on the CPU.

    `vocab_size`, `context_length` and `eos_id` are those of the tokenizer, and win over those of the architecture. With
    `output_dict` calling the model gives a dict: image_features and text_features (b, z), logit_scale, logit_bias.
    Raises ValueError for an architecture that is not known, or cannot be built.

    The bias of the text tower's qk-norm stays zero and frozen: the reference has none, but open_clip's files need it.
    """
    model = build(folder_config(config, vocab_size, context_length, eos_id), output_dict)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.ln_q.bias", "attn.ln_k.bias")):
            parameter.requires_grad_(False)
    if config.start == "quick":
        start_quickly(model)
    return model


def folder_config(
    config: ModelConfig, vocab_size: int | None = None, context_length: int | None = None, eos_id: int | None = None
) -> dict:
    """Return what `open_clip_config.json` of such a model holds: model_cfg, preprocess_cfg, and softmoe where needed.

    `vocab_size`, `context_length` and `eos_id` are the tokenizer's and win over those of the architecture; only our
    text tower is told of the end token.
    """
    model_cfg = architecture(config)
    from_tokenizer = {"vocab_size": vocab_size, "context_length": context_length}
    if OUR_TEXT in model_cfg["text_cfg"]:
        from_tokenizer["eos_id"] = eos_id
    model_cfg["text_cfg"] |= {name: value for name, value in from_tokenizer.items() if value is not None}
    starts = {"init_logit_scale": config.init_logit_scale, "init_logit_bias": config.init_logit_bias}
    model_cfg |= {name: start for name, start in starts.items() if start is not None}
    written = {"model_cfg": model_cfg, "preprocess_cfg": deepcopy(NEW_MODEL_PREPROCESS)}
    for tower, moe in (("image_moe", config.image_moe), ("text_moe", config.text_moe)):
        if moe is not None:
            layers = moe.layers if isinstance(moe.layers, str) else list(moe.layers)
            written.setdefault("softmoe", {})[tower] = asdict(moe) | {"layers": layers}
    return written


def architecture(config: ModelConfig) -> dict:
    """Read the architecture of a model, its text tower as `text_tower` and `context_length` change it."""
    model_cfg = read_architecture(config.arch)
    if config.text_tower is not None:
        folder = str(Path(config.text_tower).absolute())  # a relative path could be a name on the hub
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"model.text_tower: {config.text_tower} is no folder of transformers': no config.json there"
            )
        model_cfg["text_cfg"] = {
            "hf_model_name": folder,
            "hf_tokenizer_name": folder,
            "hf_proj_type": "linear",
            "context_length": model_cfg["text_cfg"].get("context_length", 77),
        }
    if config.context_length is not None:
        model_cfg["text_cfg"]["context_length"] = config.context_length
    return model_cfg


def read_architecture(arch: str) -> dict:
    """Read an architecture in open_clip's format: a JSON file, or a name that open_clip knows (ours are among them)."""
    if arch.endswith(".json"):
        from softmoe_clip.config import find_config

        model_cfg = read_json(find_config(arch))
    else:
        import open_clip

        import softmoe_clip.plugin  # noqa: F401  makes our names known

        model_cfg = open_clip.get_model_config(arch)
        if model_cfg is None:
            near = get_close_matches(arch, open_clip.list_models(), n=1, cutoff=0)[0]
            raise ValueError(f"no architecture is called {arch!r}: did you mean {near!r}?")
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model_cfg]
    if missing:
        raise ValueError(f"{arch} is no open_clip architecture: it has no {', '.join(missing)}")
    for key in ("vision_cfg", "text_cfg"):
        if not isinstance(model_cfg[key], dict):
            raise ValueError(f"{arch} is no open_clip architecture: {key} must be an object, got {model_cfg[key]!r}")
    return model_cfg


def read_json(path: str | Path) -> dict:
    """Read a JSON file that holds an object; raises ValueError, naming the file, for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no whole JSON'}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def build(written: dict, output_dict: bool = True, source: str = "the model config") -> nn.Module:
    """Build the model that the content of an `open_clip_config.json` describes, with fresh weights."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    import softmoe_clip.plugin  # noqa: F401  makes our towers known to timm
    from softmoe_clip.moe.install import install

    moe = {tower: load_strict(MoEConfig, settings) for tower, settings in (written.get("softmoe") or {}).items()}
    model = build_dense(written["model_cfg"], "text_moe" in moe, output_dict, source)
    if "image_moe" in moe:
        install(model.visual, moe["image_moe"])
    if "text_moe" in moe:
        install(model.text, moe["text_moe"])
    check_image_size(model.visual, source)
    check_width(model.visual, written["model_cfg"]["embed_dim"], source)
    see_pictures_as(model, merge_preprocess_dict(PreprocessCfg(), written["preprocess_cfg"]))
    return model


def see_pictures_as(model: nn.Module, preprocess: dict) -> None:
    """Tell a model how pictures are prepared for it, at its own resolution; what `preprocess` leaves out stays."""
    import open_clip

    before = getattr(model.visual, "preprocess_cfg", {})
    open_clip.set_model_preprocess_cfg(model, before | preprocess | {"size": model.visual.image_size})


def preprocessing_of(model: nn.Module) -> dict:
    """Return how pictures are prepared for a model, its resolution aside."""
    return {key: value for key, value in model.visual.preprocess_cfg.items() if key in PREPROCESSING}


def build_dense(model_cfg: dict, text_moe: bool, output_dict: bool, source: str) -> nn.Module:
    """Build open_clip's model; where text_cfg has the key `softmoe_text`, our text tower takes the place of its own."""
    import open_clip

    arguments = deepcopy(model_cfg)
    text_cfg = arguments["text_cfg"]
    ours, from_transformers = OUR_TEXT in text_cfg, bool(text_cfg.get("hf_model_name"))
    custom_text = arguments.pop("custom_text", False) or from_transformers or ours or text_moe
    kind = (
        open_clip.CoCa if "multimodal_cfg" in arguments else open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    )
    if ours:
        if kind is open_clip.CoCa:
            raise ValueError(f"{source}: CoCa's decoder needs open_clip's own text tower, take out {OUR_TEXT}")
        arguments["text_cfg"] = PLACEHOLDER_TEXT
    if kind is not open_clip.CoCa:  # whose output is a dict anyway
        arguments["output_dict"] = output_dict
        check_no_tokens(arguments, source)
    check_sizes(model_cfg, source)
    try:
        model = kind(**arguments)
    except (TypeError, RuntimeError, AssertionError, OSError, LookupError, ValueError, AttributeError) as error:
        if from_transformers and isinstance(error, KeyError | TypeError):
            raise ValueError(
                f"{source}: open_clip runs no text encoder of the kind in {text_cfg['hf_model_name']} ({error}): it "
                "knows BERT, RoBERTa, XLM-RoBERTa; mT5 and M2M-100 with is_encoder_decoder true in their config.json"
            ) from None
        # An assertion without words is told by its own line.
        reason = " ".join(str(error).split())[:300] or traceback.extract_tb(error.__traceback__)[-1].line
        raise ValueError(f"{source} describes no model that can be built: {reason}") from None
    if kind is open_clip.CoCa:
        # open_clip draws it nowhere: it would be what the memory happened to hold, at times NaN.
        projection = model.text_decoder.text_projection
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    if ours:
        from softmoe_clip.models.text import build_text_tower

        model.text = build_text_tower(text_cfg, arguments["embed_dim"])
        model.context_length, model.vocab_size = model.text.context_length, model.text.vocab_size
    if from_transformers:
        check_transformers_sizes(model.text, text_cfg, source)
        model.text.float()  # transformers keeps the precision of the file, half for some
    return model


def check_no_tokens(model_cfg: dict, source: str) -> None:
    """Refuse towers that give their tokens, too: only CoCa's decoder reads them."""
    for tower in ("vision_cfg", "text_cfg"):
        if model_cfg[tower].get("output_tokens"):
            raise ValueError(f"{source}: {tower}.output_tokens is for CoCa alone (multimodal_cfg): leave it out")


def check_transformers_sizes(tower: nn.Module, text_cfg: dict, source: str) -> None:
    """Refuse more ids, or longer rows, than a transformers tower embeds, and a projection that is missing."""
    if not hasattr(tower, "proj"):  # open_clip leaves it out, and fails when the first caption comes
        raise ValueError(
            f"{source}: text_cfg.hf_proj_type is {text_cfg.get('hf_proj_type')}, but what "
            f"{text_cfg['hf_model_name']} gives must be projected to embed_dim {tower.output_dim}: set it to linear"
        )
    for name in ("vocab_size", "context_length"):
        wanted, there = text_cfg.get(name, 0), getattr(tower, name)
        if there and wanted > there:
            raise ValueError(
                f"{source}: text_cfg.{name} (the tokenizer's) is {wanted}, but {text_cfg['hf_model_name']} has {there}"
            )


def check_image_size(tower: nn.Module, source: str) -> None:
    """Refuse a picture size that the timm trunk was not built for: open_clip does not pass it on."""
    built_for = getattr(getattr(getattr(tower, "trunk", None), "patch_embed", None), "img_size", None)
    if built_for is not None and tuple(built_for) != tuple(tower.image_size):
        raise ValueError(
            f"{source}: vision_cfg.image_size is {in_words(tower.image_size)}, but its timm tower takes "
            f"{in_words(built_for)}: name a tower for that size in timm_model_name"
        )


def in_words(size: Sequence[int]) -> str:
    """Write height and width, once where they are equal."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]} x {size[1]}"


def check_width(tower: nn.Module, embed_dim: int, source: str) -> None:
    """Refuse a timm trunk without a projection that is not as wide as the embeddings."""
    trunk = getattr(tower, "trunk", None)
    if trunk is None or len(tower.head):
        return
    width = trunk.num_classes or getattr(trunk, "head_hidden_size", trunk.num_features)
    if width != embed_dim:
        raise ValueError(
            f"{source}: embed_dim is {embed_dim}, but without a projection (vision_cfg.timm_proj) its timm tower "
            f"gives {width}: make both the same, or set timm_proj to linear"
        )
