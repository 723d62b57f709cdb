"""From a run's config to a model with fresh weights, its tokenizer and its transform."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from softmoe_clip.config import ModelConfig, TrainConfig
from softmoe_clip.data_pipelines.images import decode_rgb
from softmoe_clip.data_pipelines.pictures import Features, Picture, RandomCrop, Whole
from softmoe_clip.data_pipelines.samples import read_pair
from softmoe_clip.data_pipelines.stream import Stream
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.tokenizers import (
    Tokenizer,
    TransformersTokenizer,
    load_tokenizer,
    open_clip_tokenizer,
    options_in,
    set_options,
)
from softmoe_clip.data_pipelines.transforms import Augment
from softmoe_clip.models.continue_from import continue_from
from softmoe_clip.models.create import (
    architecture,
    create_model,
    folder_config,
    preprocessing_of,
    see_pictures_as,
)
from softmoe_clip.models.store import LoadedModel, transform_of
from softmoe_clip.models.tokenizer_fit import check_tokenizer
from softmoe_clip.models.trunk import FromFeatures, check_features
from softmoe_clip.moe.expert_parallel import ExpertGroup, spread_over
from softmoe_clip.training.branch import branch_point
from softmoe_clip.training.freeze import freeze
from softmoe_clip.training.lora import add_adapters
from softmoe_clip.training.losses import LOGIT_BIAS_START, LOGIT_SCALE_START
from softmoe_clip.training.run_folder import seen_by_run


def build(config: TrainConfig, group: ExpertGroup | None = None, begun: Path | None = None) -> LoadedModel:
    """Create the model of a run, frozen where it says so; the same seed (or `init`) gives the same weights.

    With a group of processes, each of them holds its share of these weights' experts. A run that goes on is in the
    folder `begun`: a checkpoint will give the weights, and `init` may be gone.
    """
    text_cfg = architecture(config.model)["text_cfg"]
    tokenizer = run_tokenizer(config.tokenizer, text_cfg)
    if tokenizer.eos_id is None and text_cfg.get("softmoe_text", {}).get("padding") == "mask":
        raise ValueError(
            f"tokenizer {config.tokenizer} has no end token, which `padding: mask` of {config.model.arch} needs"
        )
    model_config = with_loss_start(config.model, config.loss)
    torch.manual_seed(config.seed)
    with spread_over(group):
        model = create_model(model_config, tokenizer.vocab_size, tokenizer.context_length, eos_id=tokenizer.eos_id)
    check_tokenizer(model, tokenizer, f"tokenizer {config.tokenizer}")
    written = folder_config(model_config, tokenizer.vocab_size, tokenizer.context_length, tokenizer.eos_id)
    if isinstance(tokenizer, TransformersTokenizer):
        set_options(written["model_cfg"]["text_cfg"], tokenizer.options)
    trunk = branch_point(config)
    if config.init is not None and begun is None and trunk is None:
        continue_from(model, config.init, tokenizer, written)
        set_logits(model, config.model)
    if begun is not None or trunk is not None:
        see_pictures_as(model, seen_by_run(trunk.parent.parent if begun is None else begun))
    if config.lora is None:
        freeze(model, config.freeze)
    else:
        add_adapters(model, config.lora, config.freeze, config.seed)
    written["preprocess_cfg"] |= preprocessing_of(model)
    return LoadedModel(model, tokenizer, transform_of(model), written)


def run_picture(config: TrainConfig, loaded: LoadedModel, shards: ShardSet | Stream) -> Picture:
    """Choose what the towers are shown: random crops, whole pictures, or features that a frozen trunk gave before."""
    data = config.data
    if data.image_features is not None:
        features = Features(data.image_features)
        features.check(shards)
        return features
    if data.augment == "none":
        return Whole(loaded.transform)
    height, width = loaded.picture_size
    if height != width:
        raise ValueError(
            f"the image tower takes pictures of {height} x {width} pixels, and random crops are squares: "
            "set data.augment=none"
        )
    return RandomCrop(height, Augment(crop_scale=data.crop_scale, flip=data.flip))


def check_picture(picture: Picture, loaded: LoadedModel, shards: ShardSet | Stream) -> None:
    """Refuse features that another trunk made than the model's; its weights must be those that the run begins with."""
    if isinstance(picture, Features):
        samples, rng = picture.some_samples(), np.random.default_rng()
        images = [decode_rgb(read_pair(shards.read(sample)).image) for sample in samples]
        check_features(loaded, images, torch.stack([picture(b"", s, rng) for s in samples]), picture.folder)


def run_towers(config: TrainConfig, towers: nn.Module) -> nn.Module:
    """Let the towers take what `run_picture` shows them."""
    return towers if config.data.image_features is None else FromFeatures(towers)


def run_tokenizer(name: str, text_cfg: dict) -> Tokenizer:
    """Return the tokenizer in a folder or file; for `open_clip` the one the architecture names, else CLIP's BPE."""
    context_length, options = text_cfg.get("context_length", 77), options_in(text_cfg)
    if name != "open_clip":
        return load_tokenizer(name, context_length, options)
    if text_cfg.get("hf_tokenizer_name"):
        return TransformersTokenizer(text_cfg["hf_tokenizer_name"], context_length, options)
    return open_clip_tokenizer(context_length)


def with_loss_start(model: ModelConfig, loss: str) -> ModelConfig:
    """Fill in where the loss wants logit scale and bias to start, where the config leaves it open."""
    scale = LOGIT_SCALE_START[loss] if model.init_logit_scale is None else model.init_logit_scale
    bias = LOGIT_BIAS_START[loss] if model.init_logit_bias is None else model.init_logit_bias
    return replace(model, init_logit_scale=scale, init_logit_bias=bias)


@torch.no_grad()
def set_logits(model: nn.Module, config: ModelConfig) -> None:
    """Let logit scale and bias start where the config says, if it does, not where the model of `init` left them."""
    for name in ("logit_scale", "logit_bias"):
        if (start := getattr(config, f"init_{name}")) is not None:
            getattr(model, name).fill_(start)
