"""What the golden files of both sparse routers share: their settings, parameters and noise, in our layers."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
PARAMETERS = {
    "Router/dense/kernel": "gate",
    "Mlp/Dense_0/kernel": "experts.w_in",
    "Mlp/Dense_0/bias": "experts.b_in",
    "Mlp/Dense_1/kernel": "experts.w_out",
    "Mlp/Dense_1/bias": "experts.b_out",
}


def router_of(case):
    """The reference's settings of a case's router."""
    return json.loads(str(case["meta"]))["router"]


def golden_layer(case, layer_class, dtype, **settings):
    """The layer of a case, in evaluation mode; its noise, if any, is the case's own."""
    router = router_of(case)
    dispatcher = router["dispatcher"]
    layer = layer_class(
        *case["param:Router/dense/kernel"].shape,
        capacity_factor=dispatcher["capacity_factor"],
        capacity_rounding=dispatcher.get("capacity_ceil_or_round", "ceil"),
        capacity_multiple_of=dispatcher.get("capacity_multiple_of", 4),
        noise_std=router["noise_std"],
        hidden=case["param:Mlp/Dense_0/kernel"].shape[-1],
        **settings,
    ).to(dtype)
    layer.load_state_dict({ours: torch.from_numpy(case[f"param:{theirs}"]) for theirs, ours in PARAMETERS.items()})
    if "noise_standard_normal" in case:
        layer.route = partial(layer.route, noise=torch.from_numpy(case["noise_standard_normal"]).to(dtype))
    return layer.eval()


def error(reference, ours):
    """Largest |difference| / max(1, max |reference|)."""
    difference = np.abs(reference - ours.detach().double().numpy()).max()
    return difference / max(1.0, np.abs(reference).max())
