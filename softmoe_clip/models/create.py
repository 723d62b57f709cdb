"""Build two-tower models: open_clip's own classes, with Soft MoE layers put into the image tower where asked for."""

import json
from copy import deepcopy
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path

from torch import nn

from softmoe_clip.config import ModelConfig, MoEConfig
from softmoe_clip.models.starts import start_quickly

# How new models see pictures, as in the reference: values from -1 to 1, the whole picture squashed into a square.
NEW_MODEL_PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def create_model(
    config: ModelConfig, vocab_size: int | None = None, context_length: int | None = None, output_dict: bool = True
) -> nn.Module:
    """Build a new open_clip model with fresh weights, ready to train; see `folder_config` for the arguments.

    The bias of the text tower's qk-norm stays zero and frozen: the reference has none, but open_clip's files need it.
    """
    model = build(folder_config(config, vocab_size, context_length), output_dict)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.ln_q.bias", "attn.ln_k.bias")):
            parameter.requires_grad_(False)
    if config.start == "quick":
        start_quickly(model)
    return model


def folder_config(config: ModelConfig, vocab_size: int | None = None, context_length: int | None = None) -> dict:
    """Return what `open_clip_config.json` of such a model holds: model_cfg, preprocess_cfg, and softmoe where needed.

    `vocab_size` and `context_length` are the tokenizer's and win over those of the architecture.
    """
    model_cfg = read_architecture(config.arch)
    tokenizer_sizes = {"vocab_size": vocab_size, "context_length": context_length}
    model_cfg["text_cfg"] |= {name: size for name, size in tokenizer_sizes.items() if size is not None}
    starts = {"init_logit_scale": config.init_logit_scale, "init_logit_bias": config.init_logit_bias}
    model_cfg |= {name: start for name, start in starts.items() if start is not None}
    written = {"model_cfg": model_cfg, "preprocess_cfg": deepcopy(NEW_MODEL_PREPROCESS)}
    if config.image_moe is not None:
        moe = asdict(config.image_moe)
        moe["layers"] = moe["layers"] if isinstance(moe["layers"], str) else list(moe["layers"])
        written["softmoe"] = {"image_moe": moe}
    return written


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
    return model_cfg


def read_json(path: str | Path) -> dict:
    """Read a JSON file that holds an object; raises ValueError, naming the file, for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no whole JSON'}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def build(written: dict, output_dict: bool = True, source: str = "the model config") -> nn.Module:
    """Build the model that the content of an `open_clip_config.json` describes, with fresh weights."""
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    import softmoe_clip.plugin  # noqa: F401  makes our towers known to timm

    arguments = deepcopy(written["model_cfg"])
    custom_text = arguments.pop("custom_text", False) or "hf_model_name" in arguments["text_cfg"]
    kind = (
        open_clip.CoCa if "multimodal_cfg" in arguments else open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    )
    if kind is not open_clip.CoCa:  # whose output is a dict anyway
        arguments["output_dict"] = output_dict
    try:
        model = kind(**arguments)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{source} describes no model that can be built: {' '.join(str(error).split())}") from None
    if image_moe := written.get("softmoe", {}).get("image_moe"):
        from softmoe_clip.moe.install import install

        install(model.visual, MoEConfig(**image_moe))
    check_image_size(model.visual, source)
    preprocess = merge_preprocess_dict(PreprocessCfg(), written["preprocess_cfg"])
    open_clip.set_model_preprocess_cfg(model, preprocess | {"size": model.visual.image_size})
    return model


def check_image_size(tower: nn.Module, source: str) -> None:
    """Refuse a picture size that the timm trunk was not built for: open_clip does not pass it on."""
    built_for = getattr(getattr(getattr(tower, "trunk", None), "patch_embed", None), "img_size", None)
    if built_for is not None and tuple(built_for) != tuple(tower.image_size):
        raise ValueError(
            f"{source}: vision_cfg.image_size is {tower.image_size[0]}, but its timm tower takes {built_for[0]}"
        )
