"""Contrastive losses as loops over all pairs, and a part of them computed in a process of its own."""

import math
from itertools import product

import torch
import torch.distributed as dist

from softmoe_clip.training.distributed import alone, gather_with_grad, over_processes
from softmoe_clip.training.duplicates import Duplicates
from softmoe_clip.training.losses import LOSSES

NUM_PAIRS, WIDTH = 8, 5
COUNT_AS = ("negatives", "positives", "masked")
# 1 and 3 share a caption, 1 and 4 a picture, 3 and 4 nothing; some are alike across the parts of two or four processes.
CAPTION_IDS = (-9, 1, 2, 1, 4, 5, 6, 2)
PICTURE_IDS = (20, 21, 22, 23, 21, 25, 26, 20)


def draws(dtype=torch.float64):
    """Unit vectors of pictures and texts, a scale and a bias, all of which want a gradient."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(NUM_PAIRS, WIDTH, generator=generator, dtype=dtype), dim=-1)
        for _ in range(2)
    )
    return [t.requires_grad_() for t in (image, text, torch.tensor(7.0, dtype=dtype), torch.tensor(-3.0, dtype=dtype))]


def duplicates(count_as, part=slice(None)):
    """The ids of some pairs."""
    if count_as == "negatives":
        return None
    return Duplicates(count_as, torch.tensor(CAPTION_IDS)[part], torch.tensor(PICTURE_IDS)[part])


def value_and_gradients(loss, *inputs, **options):
    """The loss, and its gradient for each input."""
    value = loss(*inputs, **options)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    return value, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, gradients, strict=True)]


def alike(i, j):
    """Whether two pairs share a caption or a picture."""
    return CAPTION_IDS[i] == CAPTION_IDS[j] or PICTURE_IDS[i] == PICTURE_IDS[j]


def clip_by_a_loop(image, text, scale, bias, count_as="negatives"):
    """CLIP's loss, pictures against texts and texts against pictures."""
    pairs, total = range(len(image)), 0
    for rows, columns in ((image, text), (text, image)):
        for i in pairs:
            scores = [float(scale * (rows[i] * columns[j]).sum()) for j in pairs]
            compared = [j for j in pairs if count_as != "masked" or i == j or not alike(i, j)]
            positives = [j for j in pairs if i == j or (count_as == "positives" and alike(i, j))]
            whole = math.log(sum(math.exp(scores[j]) for j in compared))
            total += sum(whole - scores[j] for j in positives) / len(positives)
    return total / (2 * len(image))


def siglip_by_a_loop(image, text, scale, bias, count_as="negatives"):
    """SigLIP's loss."""
    total = 0
    for i, a in enumerate(image):
        for j, b in enumerate(text):
            score = float(scale * (a * b).sum() + bias)
            if i == j or (count_as == "positives" and alike(i, j)):
                total += math.log1p(math.exp(-score))
            elif count_as != "masked" or not alike(i, j):
                total += math.log1p(math.exp(score))
    return total / len(image)


LOOPS = {"clip": clip_by_a_loop, "siglip": siglip_by_a_loop}
CASES = list(product(LOSSES, COUNT_AS, (None, 1, 3)))


def one_of_several(rank, num_processes, folder):
    """Compute every case on this process's part of the pairs, and save what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_processes)
    try:
        assert dist.get_world_size() == num_processes
        found = {"gathered": gather_with_grad(torch.tensor([float(rank)])).tolist()}
        for name, count_as, chunk_size in CASES:
            found[f"{name} {count_as} {chunk_size}"] = one_case(rank, num_processes, name, count_as, chunk_size)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def one_case(rank, num_processes, name, count_as, chunk_size):
    """A loss over all processes, its gradients here, the collectives it took, and the loss of this part alone."""
    image, text, scale, bias = draws()
    size = NUM_PAIRS // num_processes
    part = slice(rank * size, (rank + 1) * size)
    inputs = [image[part].detach().requires_grad_(), text[part].detach().requires_grad_(), scale, bias]
    options = {"duplicates": duplicates(count_as, part), "chunk_size": chunk_size}
    with counted_collectives() as calls:
        value, gradients = value_and_gradients(LOSSES[name], *inputs, **options)
    with alone():
        by_itself = LOSSES[name](*inputs, **options).item()
    return {"value": over_processes(value, "mean"), "gradients": gradients, "calls": calls, "alone": by_itself}


class counted_collectives:
    """List the collectives that are called inside."""

    def __enter__(self):
        self.calls, self.kept = [], {name: getattr(dist, name) for name in ("all_gather_into_tensor", "all_reduce")}
        for name, function in self.kept.items():
            setattr(dist, name, self.noting(name, function))
        return self.calls

    def noting(self, name, function):
        def call(*arguments, **options):
            self.calls.append(name)
            return function(*arguments, **options)

        return call

    def __exit__(self, *_):
        for name, function in self.kept.items():
            setattr(dist, name, function)
