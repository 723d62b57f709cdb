"""Image-text contrastive models with Soft MoE towers: public names, imported only when they are used."""

from importlib import import_module
from importlib.metadata import version

__version__ = version("softmoe-clip")

# torch and open_clip take seconds to import, so that `softmoe-clip --help` must not meet them here.
PUBLIC = {
    "load": "softmoe_clip.models.store",
    "save": "softmoe_clip.models.store",
    "LoadedModel": "softmoe_clip.models.store",
    "create_model": "softmoe_clip.models.create",
    "ModelConfig": "softmoe_clip.config",
    "MoEConfig": "softmoe_clip.config",
    "SoftMoE": "softmoe_clip.moe",
    "keep_cpu_memory": "softmoe_clip.launch",
}
__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str):
    """Import a public name from its module the first time somebody asks for it."""
    if name not in PUBLIC:
        raise AttributeError(f"softmoe_clip has no name {name!r}; public names: {', '.join(PUBLIC)}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
