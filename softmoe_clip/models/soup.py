"""Average the weights of models that share a start (Wortsman et al., 2022, arXiv 2203.05482; WiSE-FT, 2109.01903)."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from softmoe_clip.data_pipelines.new_folder import refuse_existing
from softmoe_clip.eval.config import SuiteConfig
from softmoe_clip.models.alike import differences, first_different_setting, first_not_finite, same_tokenizer, shapes_of
from softmoe_clip.models.store import LoadedModel, load, save, usable_device
from softmoe_clip.models.upcycle import with_config

State = dict[str, Tensor]


def soup(models: Sequence[str], out: str | Path, weights: Sequence[float] | None = None) -> Path:
    """Write the weighted mean of models to OUT; without weights, all count the same.

    Weights are divided by their sum. Raises ValueError for models that are not built alike, and for an OUT that holds
    something: it may be a model, where OUT was forgotten.
    """
    refuse_existing(out)
    shares = [1.0] * len(models) if weights is None else list(weights)
    if len(shares) != len(models) or not isfinite(total := sum(shares)) or total == 0:
        raise ValueError(
            f"soup needs one finite weight for each of the {len(models)} models, with a sum that is not 0; got {shares}"
        )
    mixture, states = loaded_alike(models)
    mixture.model.load_state_dict(mean(states, shares))
    save(mixture, out)
    return Path(out)


def greedy_soup(models: Sequence[str], out: str | Path, score: Callable[[LoadedModel], float]) -> list[str]:
    """Add models from the best on, each kept only if the mean scores no worse; write it and return what is in it.

    `score` is the better the larger it is.
    """
    refuse_existing(out)
    mixture, states = loaded_alike(models)
    mixture = mixture._replace(model=deepcopy(mixture.model))  # the states stay as they are

    def mixed(taken: list[int]) -> LoadedModel:
        mixture.model.load_state_dict(mean([states[i] for i in taken], [1.0] * len(taken)))
        return mixture

    scores = [score(mixed([i])) for i in range(len(models))]
    first, *others = sorted(range(len(models)), key=lambda i: -scores[i])
    best, taken = scores[first], [first]
    for i in others:
        tried = [*taken, i]
        if (value := score(mixed(tried))) >= best:
            best, taken = value, tried
    save(mixed(taken), out)
    return [models[i] for i in taken]


def greedy_soup_by_suite(
    models: Sequence[str],
    out: str | Path,
    suite: SuiteConfig,
    metric: str | None,
    device: str = "auto",
    precision: str = "float32",
    batch_size: int = 64,
) -> list[str]:
    """Score by one metric of a suite, running only its task; never use the split that the final numbers come from."""
    from softmoe_clip.eval.encoder import Encoder
    from softmoe_clip.eval.results import is_rank
    from softmoe_clip.eval.suites import run_suite

    tasks = {f"{task.kind}/{task.name}/": task for task in suite.tasks}
    needed = tuple(task for start, task in tasks.items() if (metric or "").startswith(start))
    if not needed:
        known = ", ".join(f"{start}..." for start in tasks)
        raise ValueError(f"--metric must be one of a task of the suite ({known}), got {metric}")
    device = usable_device(device)

    def score(loaded: LoadedModel) -> float:
        model = loaded.model.to(device)
        encoder = Encoder(model, loaded.tokenizer, loaded.transform, device, precision, batch_size)
        found = run_suite(encoder, replace(suite, tasks=needed)).metrics
        if metric not in found:
            raise ValueError(f"--metric must be one of {', '.join(found)}; got {metric}")
        return -found[metric] if is_rank(metric) else found[metric]

    return greedy_soup(models, out, score)


def numbers(text: str | None) -> list[float] | None:
    """Read "0.7,0.3"."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights must be numbers with commas between, as in 0.7,0.3; got {text}") from None


def loaded_alike(models: Sequence[str]) -> tuple[LoadedModel, list[State]]:
    """Load all models and return one to fill, and the weights of each.

    They must be built alike, see pictures alike and read ids alike, for their weights to mean the same.
    """
    if len(models) < 2:
        raise ValueError("soup needs two models or more, then the folder to write")
    loaded = [with_config(load(model), model) for model in models]
    states = [one.model.state_dict() for one in loaded]
    for name, one, state in zip(models, loaded, states, strict=True):
        shapes = shapes_of(states[0]), shapes_of(state)
        if different := first_different_setting(loaded[0].config, one.config) or differences(*shapes, {"logit_bias"}):
            raise ValueError(f"soup: {name} is not built as {models[0]}: {different}")
        if not same_tokenizer(loaded[0].tokenizer, one.tokenizer):
            raise ValueError(f"soup: {name} was trained with another tokenizer than {models[0]}: ids are other words")
        if damaged := first_not_finite(state):
            raise ValueError(f"soup: {damaged} of {name} holds NaN or infinity: leave this model out")
    # Softmax gives the same with any bias: a model that it has trained has none, and goes with that of the others.
    if biases := [state["logit_bias"] for state in states if "logit_bias" in state]:
        states = [{"logit_bias": torch.stack(biases).mean(0)} | state for state in states]
    return max(loaded, key=lambda one: "logit_bias" in one.model.state_dict()), states


def mean(states: Sequence[State], shares: Sequence[float]) -> State:
    """Average tensors in float64; what holds no fractions is taken from the first."""
    total = sum(shares)

    def average(name: str) -> Tensor:
        first = states[0][name]
        if not first.is_floating_point():
            return first
        parts = [state[name].double() * (share / total) for state, share in zip(states, shares, strict=True)]
        return torch.stack(parts).sum(0).to(first.dtype)

    return {name: average(name) for name in states[0]}
