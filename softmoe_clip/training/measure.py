"""What is measured during training: the loss on held-out pairs, and a suite."""

from pathlib import Path

import torch

from softmoe_clip.config import TrainConfig, find_config
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.train_set import cache_of
from softmoe_clip.eval.encoder import Encoder
from softmoe_clip.eval.suites import check_suite, load_suite, run_suite
from softmoe_clip.models.store import LoadedModel
from softmoe_clip.training.distributed import alone
from softmoe_clip.training.losses import LOSSES


def measure(
    loaded: LoadedModel, config: TrainConfig, run: Path, step: int, device: torch.device, writes: bool = True
) -> dict[str, float]:
    """Return `val/loss` and the suite's metrics as `eval/...`; its results also go into the run's folder `eval`.

    A process that only lends its share of the model does the same and writes nothing.
    """
    num_workers = config.data.num_workers if device.type == "cuda" else 0  # which would wait for one that decodes
    encoder = Encoder(
        loaded.model,
        loaded.tokenizer,
        loaded.transform,
        device,
        config.precision,
        batch_size=128,
        num_workers=num_workers,
    )
    numbers = {}
    if config.data.val is not None:
        numbers["val/loss"] = validation_loss(
            encoder, ShardSet.open(config.data.val, cache_of(config.data)), config.loss, config.batch_size
        )
    if config.eval.suite is not None:
        results = run_suite(encoder, load_suite(find_config(config.eval.suite)), model_name=str(run))
        if writes:
            results.save(run / "eval" / f"step_{step:08d}.json")
        numbers |= {f"eval/{name}": value for name, value in results.metrics.items()}
    return numbers


def check_measured(config: TrainConfig) -> None:
    """Refuse held-out pairs or a suite that cannot be opened now, not hours later when they are first needed."""
    if config.data.val is not None:
        ShardSet.open(config.data.val, cache_of(config.data))
    if config.eval.suite is not None:
        check_suite(load_suite(find_config(config.eval.suite)))


@torch.no_grad()
def validation_loss(encoder: Encoder, shards: ShardSet, loss: str, batch_size: int) -> float:
    """Return the mean loss over consecutive batches of held-out pictures, each with its first caption.

    The batch size is that of training, since a contrastive loss grows with it; a rest smaller than a batch is left out
    unless it is all there is.
    """
    found = encoder.image_set(shards)
    if not all(found.captions):
        key = found.keys[list(map(bool, found.captions)).index(False)]
        raise ValueError(f"data.val: sample {key} has no caption, only a label: give shards with captions")
    images = torch.from_numpy(found.embeddings)
    texts = torch.from_numpy(encoder.texts([captions[0] for captions in found.captions]))
    scale = encoder.model.logit_scale.detach().exp().float().cpu()
    bias = getattr(encoder.model, "logit_bias", None)
    bias = bias if bias is None else bias.detach().float().cpu()
    batch_size = min(batch_size, len(images))
    starts = range(0, len(images) - batch_size + 1, batch_size)
    batches = [slice(start, start + batch_size) for start in starts]
    with alone():
        return sum(LOSSES[loss](images[b], texts[b], scale, bias).item() for b in batches) / len(batches)
