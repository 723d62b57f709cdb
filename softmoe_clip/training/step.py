"""Forward and backward of one global batch: at once, or in chunks that give the same gradients."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_clip.data_pipelines.loader import Batch
from softmoe_clip.data_pipelines.transforms import normalise
from softmoe_clip.moe.sparse import SparseMoE
from softmoe_clip.moe.stats import CollectedRouting, collect_routing
from softmoe_clip.training.draws import drawing
from softmoe_clip.training.duplicates import duplicates_of
from softmoe_clip.training.masks import no_hidden_draws


class Outcome(NamedTuple):
    """The losses of this process's part of a batch, whose gradients now stand in the parameters, and the routing."""

    loss: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    routing: CollectedRouting


class Embedded(NamedTuple):
    """What the towers give for some pairs; None for a tower that was left out."""

    image: Float[Tensor, "b z"] | None
    text: Float[Tensor, "b z"] | None
    logit_scale: Float[Tensor, ""]
    logit_bias: Float[Tensor, ""] | None


@dataclass(frozen=True)
class Stepper:
    """What the steps of a run have in common. `model` takes pictures and ids as open_clip's do, `towers` is inside it.

    `backward` is Accelerate's, which scales the loss in half precision; gradients do not cross processes in `no_sync`.
    """

    model: nn.Module
    towers: nn.Module
    loss_function: Callable[..., Tensor]
    preprocess: dict
    device: torch.device
    seed: int
    duplicates: Literal["negatives", "positives", "masked"] = "negatives"
    chunk_size: int | None = None
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    no_sync: Callable[[], AbstractContextManager] = nullcontext

    def forward_backward(self, batch: Batch, statistics: bool = False) -> Outcome:
        """Add the gradients of a batch to the parameters' own."""
        with no_hidden_draws(self.device):
            if self.chunk_size is None or self.chunk_size >= len(batch.positions):
                return self.at_once(batch, statistics)
            return self.in_chunks(batch, statistics)

    def at_once(self, batch: Batch, statistics: bool) -> Outcome:
        """Run all pairs through the towers together."""
        rows = slice(0, len(batch.positions))
        with self.drawing(batch, rows):
            with collect_routing(statistics=statistics) as routing:
                embedded = self.embed(batch, rows)
            loss = self.loss(batch, embedded)
            aux_loss = routing.aux_loss().to(loss, non_blocking=True)
            self.backward(loss + aux_loss)
        return Outcome(loss.detach(), aux_loss.detach(), routing)

    def in_chunks(self, batch: Batch, statistics: bool) -> Outcome:
        """Run `chunk_size` pairs at a time (GradCache, arXiv 2101.06983), and each chunk twice.

        The first pass keeps nothing but embeddings. The loss gives their gradients, which the second pass, with the
        same masks, carries into the towers. Logit scale and bias get theirs from the loss, once.
        """
        chunks = self.chunks(batch)
        with collect_routing(statistics=statistics) as routing, torch.no_grad(), self.no_sync():
            embedded = self.embed_all(batch)
        loss, gradients = self.embedding_gradients(batch, embedded)
        for rows in chunks:
            with self.no_sync() if rows is not chunks[-1] else nullcontext(), self.drawing(batch, rows):
                self.backward(self.surrogate(batch, rows, gradients, is_last=rows is chunks[-1]))
        return Outcome(loss, routing.aux_loss().to(loss, non_blocking=True), routing)

    def chunks(self, batch: Batch) -> list[slice]:
        """Cut the rows of a batch."""
        size = self.chunk_size or len(batch.positions)
        starts = range(0, len(batch.positions), size)
        return [slice(start, min(start + size, len(batch.positions))) for start in starts]

    def embed_all(self, batch: Batch) -> Embedded:
        """Embed a batch chunk by chunk, as the step does."""
        return joined([self.embed_chunk(batch, rows) for rows in self.chunks(batch)])

    def embed_chunk(self, batch: Batch, rows: slice) -> Embedded:
        """Embed some rows with the masks of their positions."""
        with self.drawing(batch, rows):
            return self.embed(batch, rows)

    def embedding_gradients(self, batch: Batch, embedded: Embedded) -> tuple[Float[Tensor, ""], Embedded]:
        """Return the loss and its gradient for each embedding, for logit scale and bias; None for frozen towers."""
        trained = self.trained_towers()._asdict()
        leaves = Embedded(
            *(
                value if value is None else value.detach().requires_grad_(trained.get(name, True))
                for name, value in embedded._asdict().items()
            )
        )
        loss = self.loss(batch, leaves)
        loss.backward()
        return loss.detach(), Embedded(*(None if leaf is None else leaf.grad for leaf in leaves))

    def surrogate(self, batch: Batch, rows: slice, gradients: Embedded, is_last: bool) -> Float[Tensor, ""]:
        """Embed some rows again and return what has the gradient of the whole loss with respect to them.

        The auxiliary losses, means over routing groups, count by the share of the groups that is in these rows.
        """
        with collect_routing(statistics=False) as routing:
            embedded = self.embed(batch, rows, self.trained_towers())
        total = routing.aux_loss().to(self.device, non_blocking=True)
        total = total * ((rows.stop - rows.start) / len(batch.positions))
        for features, gradient in ((embedded.image, gradients.image), (embedded.text, gradients.text)):
            if features is not None and gradient is not None:
                total = total + (features * gradient[rows]).sum()
        if is_last:  # also because DDP waits for every parameter in the pass that it averages
            for value, gradient in zip(embedded[2:], gradients[2:], strict=True):
                if value is not None:
                    total = total + value * (0.0 if gradient is None else gradient)
        return total

    def embed(self, batch: Batch, rows: slice, towers: "Towers | None" = None) -> Embedded:
        """Run some rows, whose pixels become floats only now, through both towers or those that are named."""
        images = batch.images[rows].to(self.device, non_blocking=True)
        images = normalise(images, self.preprocess["mean"], self.preprocess["std"])
        token_ids = batch.token_ids[rows].to(self.device, non_blocking=True)
        if towers is None:
            out = self.model(images, token_ids)
        else:
            out = self.model(images if towers.image else None, token_ids if towers.text else None)
        features = (full_precision(out[name]) for name in ("image_features", "text_features"))
        return Embedded(*features, out["logit_scale"], out.get("logit_bias"))

    def loss(self, batch: Batch, embedded: Embedded) -> Float[Tensor, ""]:
        """Compare the pairs of this process with all pairs of the global batch."""
        return self.loss_function(*embedded, duplicates_of(batch, self.duplicates, self.device), self.chunk_size)

    def drawing(self, batch: Batch, rows: slice) -> AbstractContextManager:
        """Let masks depend on the positions of these rows."""
        return drawing(self.seed, batch.positions[rows], self.device)

    def trained_towers(self) -> "Towers":
        """Tell which towers the second pass needs; CoCa's decoder wants both."""
        import open_clip

        if isinstance(self.towers, open_clip.CoCa):
            return Towers(image=True, text=True)
        trained = [name for name, parameter in self.towers.named_parameters() if parameter.requires_grad]
        is_image = [name.startswith("visual.") for name in trained if not name.startswith("logit_")]
        return Towers(image=any(is_image), text=not all(is_image))


class Towers(NamedTuple):
    """Some of the two towers."""

    image: bool
    text: bool


def joined(chunks: list[Embedded]) -> Embedded:
    """Put the embeddings of chunks together."""
    images, texts = (torch.cat([chunk[side] for chunk in chunks]) for side in (0, 1))
    return Embedded(images, texts, *chunks[-1][2:])


def full_precision(features: Float[Tensor, "b z"] | None) -> Float[Tensor, "b z"] | None:
    """Return half precision as float32; the loss needs it."""
    return features if features is None else features.to(torch.promote_types(features.dtype, torch.float32))


def check_chunk_size(chunk_size: int | None, model: nn.Module) -> None:
    """Refuse chunks that would not give the gradients of the whole batch."""
    if chunk_size is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, SparseMoE) and chunk_size % module.group_size:
            raise ValueError(
                f"chunk_size {chunk_size} does not hold whole routing groups of {module.group_size}, as {name} has "
                "them: make it a multiple"
            )
        mixes = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if mixes and any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(f"{name} normalises over the batch, which chunk_size cannot cut: leave chunk_size out")
