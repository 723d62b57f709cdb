"""How two models differ, in weights, settings or tokenizers, in a few words: torch lists every name of a weight."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from softmoe_clip.config import MoEConfig, flatten
from softmoe_clip.data_pipelines.strict import load_strict
from softmoe_clip.models.written import TOWERS

Shapes = Mapping[str, Sequence[int]]

PROBES = ("a photo of a dog on the beach", "Two red circles, 3 blue squares.")
# Settings of a model that may differ where its weights mean the same: where they started or what acts in training only;
# names of files; what the names and shapes of weights, or the ids of the tokenizer, tell better.
NOT_COMPARED = {
    *("init_logit_scale", "init_logit_bias", "patch_dropout", "timm_drop", "timm_drop_path"),
    *("noise_std", "importance_loss", "load_loss", "gshard_loss"),
    *("timm_model_pretrained", "hf_model_pretrained", "hf_model_name", "hf_tokenizer_name"),
    *("custom_text", "vocab_size", "size"),
}


def shapes_of(state: Mapping) -> dict[str, list[int]]:
    """Return the shape of each tensor of a state."""
    return {name: list(tensor.shape) for name, tensor in state.items()}


def shapes_in(file: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118  not a dict


def differences(ours: Shapes, theirs: Shapes, may_miss: Collection[str] = ()) -> str:
    """Name the first weight that theirs lack, the first that ours do not have, the first of another shape."""
    missing = sorted(ours.keys() - theirs.keys() - set(may_miss))
    extra = sorted(theirs.keys() - ours.keys() - set(may_miss))
    other = [name for name in ours if name in theirs and list(ours[name]) != list(theirs[name])]
    return "; ".join(
        [
            *(f"it has no {name}" for name in missing[:1]),
            *(f"it has {name} too" for name in extra[:1]),
            *(f"{name} is {list(theirs[name])} there, {list(ours[name])} here" for name in other[:1]),
        ]
    )


def first_not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Name the first weight that holds NaN or infinity."""
    return next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)


def first_different_setting(ours: dict, theirs: dict) -> str:
    """Name the first setting of two `open_clip_config.json` that matters and differs, with both values; else ""."""
    for tower in TOWERS:
        if experts_of(ours, tower) is None and (there := experts_of(theirs, tower)) is not None:
            return f"its {tower.removesuffix('_moe')} tower has experts ({there.router})"
        if experts_of(theirs, tower) is None and experts_of(ours, tower) is not None:
            return f"its {tower.removesuffix('_moe')} tower has no experts"
    # Through JSON, where tuples are lists.
    ours, theirs = (flatten(json.loads(json.dumps(with_defaults(written)))) for written in (ours, theirs))
    for key in ours | theirs:
        there, here = theirs.get(key), ours.get(key)
        if key.rsplit(".", 1)[-1] not in NOT_COMPARED and there != here:
            return f"{key} is {json.dumps(there)}, not {json.dumps(here)}"
    return ""


def with_defaults(written: dict) -> dict:
    """Write out the defaults of an `open_clip_config.json`, so that only what differs is different there."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    model_cfg = {"quick_gelu": False} | written["model_cfg"]
    model_cfg["vision_cfg"] = asdict(CLIPVisionCfg()) | model_cfg["vision_cfg"]
    model_cfg["text_cfg"] = asdict(CLIPTextCfg()) | model_cfg["text_cfg"]
    experts = {tower: config for tower in TOWERS if (config := experts_of(written, tower)) is not None}
    return {
        "model_cfg": model_cfg,
        # Which layers hold experts can be said in two ways: the names of weights tell.
        "softmoe": {tower: asdict(config) | {"layers": None} for tower, config in experts.items()},
        "preprocess_cfg": merge_preprocess_dict(PreprocessCfg(), written["preprocess_cfg"]),
    }


def experts_of(written: dict | None, tower: str) -> MoEConfig | None:
    """Return what an `open_clip_config.json` says of a tower's experts, None where it has none."""
    settings = ((written or {}).get("softmoe") or {}).get(tower)
    config = None if settings is None else load_strict(MoEConfig, settings)
    return None if config is None or config.router == "dense" else config


def same_tokenizer(ours: Callable, theirs: Callable) -> bool:
    """Tell whether two tokenizers give the same ids, for a few sentences, whatever the length of their rows."""
    return all(agree(ours([text])[0], theirs([text])[0]) for text in PROBES)


def agree(ours: Int64[Tensor, " l"], theirs: Int64[Tensor, " k"]) -> bool:
    """Tell whether two rows of ids may be of one tokenizer, where one row may be longer."""
    length = min(len(ours), len(theirs))
    if len(ours) != len(theirs):
        length -= 1  # where the shorter one may have its end token
    return torch.equal(ours[:length], theirs[:length])
