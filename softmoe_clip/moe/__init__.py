"""Mixture-of-experts layers, putting them into towers, and watching how they route."""

from softmoe_clip.moe.experts import Experts
from softmoe_clip.moe.experts_choice import ExpertsChoiceMoE
from softmoe_clip.moe.install import install
from softmoe_clip.moe.soft import Routing, SoftMoE
from softmoe_clip.moe.sparse import SparseRouting
from softmoe_clip.moe.stats import collect_routing
from softmoe_clip.moe.tokens_choice import TokensChoiceMoE

__all__ = [
    "Experts",
    "ExpertsChoiceMoE",
    "Routing",
    "SoftMoE",
    "SparseRouting",
    "TokensChoiceMoE",
    "collect_routing",
    "install",
]
