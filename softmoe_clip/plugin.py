"""Importing this module makes our towers known to timm and our two-tower models known to open_clip."""

from pathlib import Path

import open_clip

import softmoe_clip.models.vit

MODEL_CONFIGS = Path(__file__).parent / "configs" / "models"
TIMM_NAMES = tuple(softmoe_clip.models.vit.NAMES)

open_clip.add_model_config(MODEL_CONFIGS)
