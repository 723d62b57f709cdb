"""Mixture-of-experts layers, putting them into towers, and watching how they route."""

from softmoe_clip.moe.experts import Experts
from softmoe_clip.moe.install import install
from softmoe_clip.moe.soft import Routing, SoftMoE
from softmoe_clip.moe.stats import collect_routing

__all__ = ["Experts", "Routing", "SoftMoE", "collect_routing", "install"]
