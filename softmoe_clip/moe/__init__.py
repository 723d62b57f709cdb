"""Mixture-of-experts layers, putting them into towers, and watching how they route; imported only when used."""

from importlib import import_module

PUBLIC = {
    "Experts": "softmoe_clip.moe.experts",
    "SoftMoE": "softmoe_clip.moe.soft",
    "Routing": "softmoe_clip.moe.soft",
    "install": "softmoe_clip.moe.install",
    "collect_routing": "softmoe_clip.moe.stats",
}
__all__ = ["Experts", "Routing", "SoftMoE", "collect_routing", "install"]


def __getattr__(name: str):
    """Import a public name from its module the first time somebody asks for it."""
    if name not in PUBLIC:
        raise AttributeError(f"softmoe_clip.moe has no name {name!r}; public names: {', '.join(PUBLIC)}")
    # Kept here, so that the function `install` is not hidden by its module of the same name later on.
    globals()[name] = found = getattr(import_module(PUBLIC[name]), name)
    return found
