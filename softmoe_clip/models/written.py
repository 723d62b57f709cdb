"""Check what an `open_clip_config.json` says before anything is built from it: each mistake one sentence."""

from collections.abc import Sequence

from softmoe_clip.config import MoEConfig
from softmoe_clip.data_pipelines.strict import load_strict

NEEDED = {"model_cfg": ("embed_dim", "vision_cfg", "text_cfg"), "preprocess_cfg": ("mean", "std")}
CHOICES = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}
# Sizes that count something; open_clip's towers, and the layers of its ResNets, are all described by them.
COUNTED = {
    "vision_cfg": ("image_size", "patch_size", "width", "head_width", "layers"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers"),
}
TOWERS = ("image_moe", "text_moe")


def check_written(written: dict, source: str) -> None:
    """Raise ValueError where sizes or preprocessing are missing, or where something is not of its kind."""
    for key, inner in NEEDED.items():
        there = written.get(key) or {}
        check(isinstance(there, dict), source, key, "must be an object", there)
        missing = [name for name in inner if name not in there]
        if missing:
            raise ValueError(f"{source} has no {key} with {', '.join(missing)}: it can't be guessed, write it there")
    for name in ("vision_cfg", "text_cfg"):
        value = written["model_cfg"][name]
        check(isinstance(value, dict), source, f"model_cfg.{name}", "must be an object", value)
    check_preprocessing(written["preprocess_cfg"], source)
    moe = written.get("softmoe") or {}
    known = isinstance(moe, dict) and set(moe) <= set(TOWERS)
    check(known, source, "softmoe", f"must be an object with {' or '.join(TOWERS)}", moe)
    for tower, settings in moe.items():
        check(isinstance(settings, dict), source, f"softmoe.{tower}", "must be an object", settings)
        try:
            load_strict(MoEConfig, settings)
        except ValueError as error:
            raise ValueError(f"{source}: softmoe.{tower}: {error}") from None


def check_sizes(model_cfg: dict, source: str) -> None:
    """Refuse towers without pixels, patches, blocks or words, and patches larger than the picture."""
    check_count(model_cfg["embed_dim"], f"{source}: embed_dim")
    for tower, names in COUNTED.items():
        for name in names:
            value = model_cfg[tower].get(name)
            several = value if value and isinstance(value, list | tuple) else [1 if value is None else value]
            for each in several:
                check_count(each, f"{source}: {tower}.{name}")
        ratio = model_cfg[tower].get("mlp_ratio", 4.0)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < float("inf"):
            raise ValueError(f"{source}: {tower}.mlp_ratio must be a number above 0, got {ratio!r}")
    vision = model_cfg["vision_cfg"]
    smallest = min(sides(vision.get("image_size") or 224))
    patch = max(sides(vision.get("patch_size") or 1))
    if patch > smallest:
        raise ValueError(f"{source}: vision_cfg.patch_size {patch} is larger than its pictures, of {smallest} pixels")


def check_count(value: object, what: str) -> None:
    """Refuse what does not count something; True is no number here."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number from 1, got {value!r}")


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width, of a square where one number is given."""
    return (size, size) if isinstance(size, int) else tuple(size)


def check_preprocessing(preprocess: dict, source: str) -> None:
    """Refuse what pictures cannot be prepared with."""
    for name in ("mean", "std"):
        value = preprocess[name]
        numbers = isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(x, int | float) for x in value)
        check(numbers, source, f"preprocess_cfg.{name}", "must be three numbers", value)
    std = preprocess["std"]
    check(min(std) > 0, source, "preprocess_cfg.std", "must be above 0, since pictures are divided by it", std)
    fill = preprocess.get("fill_color", 0)
    colours = fill if isinstance(fill, list | tuple) and len(fill) == 3 else [fill]
    check(
        all(isinstance(x, int) for x in colours), source, "preprocess_cfg.fill_color", "must be one or three ints", fill
    )
    for name, choices in CHOICES.items():
        value = preprocess.get(name, choices[0])
        check(value in choices, source, f"preprocess_cfg.{name}", f"must be one of {', '.join(choices)}", value)


def check(holds: bool, source: str, key: str, wish: str, value: object) -> None:
    """Raise the sentence for one setting."""
    if not holds:
        raise ValueError(f"{source}: {key} {wish}, got {str(value)[:100]!r}")
