"""Make a Soft MoE model of a dense one: its image tower's MLPs become experts, all else stays as it was trained."""

import re
import shlex
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from softmoe_clip.config import MoEConfig
from softmoe_clip.data_pipelines.new_folder import refuse_existing
from softmoe_clip.data_pipelines.tokenizers import open_clip_tokenizer
from softmoe_clip.models.alike import experts_of
from softmoe_clip.models.comparison import check_finite, embedded, pairs_to_compare
from softmoe_clip.models.create import build, preprocessing_of
from softmoe_clip.models.same_function import in_yaml
from softmoe_clip.models.store import (
    LoadedModel,
    check_known,
    load,
    read_folder,
    save,
    transform_of,
    without_downloads,
)
from softmoe_clip.models.written import TOWERS
from softmoe_clip.moe.install import tower_blocks, tower_label
from softmoe_clip.moe.upcycle import Mode, upcycle_tower

MOST_BLOCKS = 10_000


class Change(NamedTuple):
    """Cosines of embeddings before and after, and what they were measured on."""

    mean: float
    least: float
    measured_on: str


class Upcycled(NamedTuple):
    """What upcycling changed; `text` is None where the text tower stayed as it was."""

    image: Change
    text: Change | None = None


def upcycle(
    source: str,
    out: str | Path,
    num_experts: int,
    layers: str | list[int] = "last_half",
    mode: str = "copy",
    slots_per_expert: int = 1,
    pictures: str | None = None,
    text: bool = False,
    seed: int = 0,
) -> Upcycled:
    """Write the model folder `out`: the dense model `source` with Soft MoE layers in its image tower.

    `layers` is last_half, or block numbers as in "6,7,9-11"; with `text` they are those of the text tower, too. Soft
    MoE mixes tokens, so that copies do not keep what a tower computes: how much is left is measured on `pictures`
    (shards, or a folder) and their captions, without them on noise and on a few sentences. Slots, and the noise of
    mode `noise`, are drawn with `seed`.
    A source `timm:NAME` is a ViT with timm's pretrained weights; the text tower beside it is new.
    Raises ValueError, one sentence, for what cannot be upcycled; then nothing is written.
    """
    check_mode(mode, pictures)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be 0 to 2**63 - 1, got {seed}")
    moe = MoEConfig(layers=block_list(layers), num_experts=num_experts, slots_per_expert=slots_per_expert)
    check_not_itself(source, out)
    refuse_existing(out)
    loaded = new_text_tower(source.removeprefix("timm:")) if source.startswith("timm:") else load(source)
    loaded = with_config(loaded, source)
    towers = {"image_moe": loaded.model.visual}
    if text:
        loaded = with_text_module(loaded)
        towers = {"image_moe": loaded.model.visual, "text_moe": loaded.model.text}
    written = loaded.config.get("softmoe") or {}
    for key, tower in towers.items():
        check_dense(tower, written.get(key), source)
    pairs = pairs_to_compare(loaded, pictures)
    fitted_on, pairs = pairs.halves(text) if mode == "centroids" else (None, pairs)
    shown = {
        "image_moe": lambda: loaded.model.encode_image(fitted_on.images),
        "text_moe": lambda: loaded.model.encode_text(loaded.tokenizer(fitted_on.captions)),
    }
    before = embedded(loaded, pairs, text)
    check_finite(before, source)
    with torch.no_grad():
        done = {key: asdict(upcycle_tower(tower, moe, mode, seed, shown[key])) for key, tower in towers.items()}
    loaded.config["softmoe"] = written | done
    changed = changes(before, embedded(loaded, pairs, text), pairs.described)
    save(loaded, out)
    return Upcycled(*changed)


def to_train_on(out: str | Path) -> str:
    """Return the settings with which a run starts from what was upcycled, beside those of the dense model's run."""
    _, written = read_folder(Path(out))
    experts = {tower: experts_of(written, tower) for tower in TOWERS}
    chosen = [f"'model.{tower}={in_yaml(config)}'" for tower, config in experts.items() if config is not None]
    return " ".join([shlex.quote(f"init={out}"), *chosen])


def changes(before: Sequence[Tensor], after: Sequence[Tensor], described: Sequence[str]) -> list[Change]:
    """Compare the embeddings of each kind, row by row."""
    cosines = map(torch.nn.functional.cosine_similarity, before, after)
    return [Change(each.mean().item(), each.min().item(), what) for each, what in zip(cosines, described, strict=False)]


def check_mode(mode: str, pictures: str | None) -> None:
    """Refuse a mode that is unknown or has nothing to look at."""
    if mode not in (modes := get_args(Mode)):
        raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    if mode == "centroids" and pictures is None:
        raise ValueError("mode centroids looks at pictures: give some with --pictures")


def block_list(layers: str | list[int]) -> str | list[int]:
    """Read "6,7,9-11" as block numbers; last_half stays."""
    if layers == "last_half" or not isinstance(layers, str):
        return layers
    blocks = []
    for part in layers.split(","):
        ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not first <= last < MOST_BLOCKS:
            raise ValueError(f"layers must be last_half or block numbers as in 6,7,9-11, got {layers!r}")
        blocks += range(first, last + 1)
    return blocks


def new_text_tower(name: str, pretrained: bool = True) -> LoadedModel:
    """Put an untrained text tower of the same width beside a ViT of timm's, with CLIP's tokenizer."""
    import timm

    import softmoe_clip.plugin  # noqa: F401  makes our towers known to timm

    if not timm.is_model(name):
        check_known("timm model", name, timm.list_models())
    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0)
    tower_blocks(trunk)
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
    return loaded._replace(config={"model_cfg": model_cfg, "preprocess_cfg": preprocessing_of(loaded.model)})


def with_text_module(loaded: LoadedModel) -> LoadedModel:
    """Rebuild a model of open_clip's class CLIP, which spreads its text tower out, with that tower as `model.text`."""
    if hasattr(loaded.model, "text"):
        return loaded
    tower_blocks(loaded.model)  # nearly all of them are causal: refused before anything is built
    config = deepcopy(loaded.config)
    config["model_cfg"]["custom_text"] = True
    model = build(without_downloads(config)).eval()
    whole = ("visual.", "logit_scale", "logit_bias")
    state = loaded.model.state_dict()
    model.load_state_dict({name if name.startswith(whole) else f"text.{name}": state[name] for name in state})
    return loaded._replace(model=model, config=config)


def check_not_itself(source: str, out: str | Path) -> None:
    """Refuse to write over the dense model: it could not be upcycled, or compared with, again."""
    folder = Path(source.removeprefix("local-dir:")).resolve()
    if Path(out).resolve() in (folder, folder / "model"):
        raise ValueError(f"{out} is the dense model itself: choose another folder for the upcycled one")


def check_dense(tower: nn.Module, written: dict | None, source: str) -> None:
    """Refuse a tower that cannot hold experts, or one whose folder says that it has some: two sorts cannot be kept."""
    tower_blocks(tower)
    if written is not None and written.get("router") != "dense":
        raise ValueError(
            f"the {tower_label(tower)} tower of {source} holds MoE layers already: upcycle the dense model it came from"
        )
