"""Make a Soft MoE model of a dense one: its image tower's MLPs become experts, all else stays as it was trained."""

import re
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from softmoe_clip.config import MoEConfig
from softmoe_clip.data_pipelines.images import decode_rgb
from softmoe_clip.data_pipelines.sources import PICTURES
from softmoe_clip.data_pipelines.tokenizers import open_clip_tokenizer
from softmoe_clip.models.create import build
from softmoe_clip.models.store import LoadedModel, check_known, load, save, transform_of
from softmoe_clip.moe.upcycle import Mode, upcycle_tower

NUM_PICTURES = 64
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode", "fill_color")


class Upcycled(NamedTuple):
    """Cosines of image embeddings before and after, and what they were measured on."""

    mean: float
    least: float
    measured_on: str


def upcycle(
    source: str,
    out: str | Path,
    num_experts: int,
    layers: str | list[int] = "last_half",
    mode: str = "copy",
    slots_per_expert: int = 1,
    pictures: str | None = None,
) -> Upcycled:
    """Write the model folder `out`: the dense model `source` with Soft MoE layers in its image tower.

    `layers` is last_half, or block numbers as in "6,7,9-11". Soft MoE mixes tokens, so that copies do not keep what the
    tower computes: how much is left is measured on `pictures` (shards, or a folder), on noise where there are none.
    A source `timm:NAME` is a ViT with timm's pretrained weights; the text tower beside it is new.
    Raises ValueError, one sentence, for what cannot be upcycled; then nothing is written.
    """
    if mode not in (modes := Mode.__args__):
        raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    moe = MoEConfig(layers=block_list(layers), num_experts=num_experts, slots_per_expert=slots_per_expert)
    loaded = new_text_tower(source.removeprefix("timm:")) if source.startswith("timm:") else load(source)
    loaded = with_config(loaded, source)
    images, measured_on = measured_pictures(loaded, pictures)
    before = embedded(loaded.model, images)
    moe = upcycle_tower(loaded.model.visual, moe, mode)
    cosines = torch.nn.functional.cosine_similarity(before, embedded(loaded.model, images), dim=-1)
    loaded.config["softmoe"] = (loaded.config.get("softmoe") or {}) | {"image_moe": asdict(moe)}
    save(loaded, out)
    return Upcycled(cosines.mean().item(), cosines.min().item(), measured_on)


def block_list(layers: str | list[int]) -> str | list[int]:
    """Read "6,7,9-11" as block numbers; last_half stays."""
    if layers == "last_half" or not isinstance(layers, str):
        return layers
    blocks = []
    for part in layers.split(","):
        ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if ends is None:
            raise ValueError(f"layers must be last_half or block numbers as in 6,7,9-11, got {layers!r}")
        blocks += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return blocks


def new_text_tower(name: str, pretrained: bool = True) -> LoadedModel:
    """Put an untrained text tower of the same width beside a ViT of timm's, with CLIP's tokenizer."""
    import timm

    import softmoe_clip.plugin  # noqa: F401  makes our towers known to timm

    if not timm.is_model(name):
        check_known("timm model", name, timm.list_models())
    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0)
    cfg, width = trunk.pretrained_cfg, trunk.num_features
    if cfg["input_size"][1] != cfg["input_size"][2] or width % 64:
        raise ValueError(
            f"{name} takes {cfg['input_size']} and is {width} wide: give one for squares, a multiple of 64"
        )
    vision = {"timm_model_name": name, "timm_pool": trunk.global_pool, "timm_proj": "none"}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": width // 64, "layers": 12}
    preprocess = {key: list(cfg[key]) for key in ("mean", "std")} | {
        "interpolation": cfg["interpolation"],
        "resize_mode": "squash" if cfg.get("crop_mode") == "squash" else "shortest",
    }
    model_cfg = {"embed_dim": width, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    model_cfg["vision_cfg"]["image_size"] = cfg["input_size"][1]
    written = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    to_build = deepcopy(written)
    to_build["model_cfg"]["vision_cfg"]["timm_model_pretrained"] = pretrained
    model = build(to_build, source=f"timm:{name}").eval()
    return LoadedModel(model, open_clip_tokenizer(77), transform_of(model), written)


def with_config(loaded: LoadedModel, source: str) -> LoadedModel:
    """Give a model of open_clip's the config that its folder would hold."""
    if loaded.config is not None:
        return loaded
    import open_clip
    from open_clip.transformer import QuickGELU

    name = source if source.startswith("hf-hub:") else source.rsplit(":", 1)[0]
    model_cfg = open_clip.get_model_config(name)
    # Not in the architecture: some tags bring it along.
    if any(isinstance(module, QuickGELU) for module in loaded.model.modules()):
        model_cfg["quick_gelu"] = True
    preprocess_cfg = {key: value for key, value in loaded.preprocess_cfg.items() if key in PREPROCESSING}
    return loaded._replace(config={"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})


def measured_pictures(loaded: LoadedModel, pictures: str | None) -> tuple[Tensor, str]:
    """Return up to 64 transformed pictures (b, 3, r, r) and what to call them."""
    if pictures is None:
        shape = (NUM_PICTURES // 4, 3, loaded.image_size, loaded.image_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise, f"{len(noise)} pictures of random pixels, for want of real ones"
    folder = Path(pictures)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        images = folder_pictures(folder, loaded.transform)
    else:
        images = shard_pictures(pictures, loaded.transform)
    return images, f"{len(images)} pictures of {pictures}"


def folder_pictures(folder: Path, transform) -> Tensor:
    """Read the first pictures of a folder, in order of their names."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in PICTURES and file.is_file()]
    images = [transform(decode_rgb(file.read_bytes())) for file in files[:NUM_PICTURES]]
    if not images:
        raise ValueError(f"no pictures and no shards in {folder}: check the path")
    return torch.stack(images)


def shard_pictures(shards: str, transform) -> Tensor:
    """Read the first pictures of shards."""
    from softmoe_clip.data_pipelines.loader import eval_batches
    from softmoe_clip.data_pipelines.tar_index import ShardSet

    return next(iter(eval_batches(ShardSet.open(shards), transform, NUM_PICTURES))).images


def embedded(model: nn.Module, images: Tensor) -> Tensor:
    """Embed pictures in eval mode, a few at a time, in float64 for the comparison."""
    with torch.inference_mode():
        return torch.cat([model.encode_image(part).double() for part in images.split(16)])
