"""Fetch model folders from the Hugging Face hub, through huggingface_hub and its cache; from nowhere else."""

from pathlib import Path

from softmoe_clip.data_pipelines.shards import is_remote
from softmoe_clip.data_pipelines.tokenizers import SETTINGS_FILE
from softmoe_clip.models.create import OUR_TEXT

# What tells whose folder it is, and all that a folder of ours holds.
DESCRIPTION = ["open_clip_config.json", SETTINGS_FILE]
WHOLE = ["*.json", "*.txt", "*.model", "open_clip_model.safetensors"]


def fetch(repo: str, patterns: list[str]) -> Path:
    """Download the files of a repository that fit the patterns, as far as the cache lacks them; return the folder."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:  # hubs fail in many ways, and each of them means the same to the user
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot get the model hf-hub:{repo}: {reason}") from error


def is_ours(folder: Path, written: dict) -> bool:
    """Tell a folder that `save` wrote from one of open_clip's, which open_clip itself loads."""
    return (folder / SETTINGS_FILE).exists() or "softmoe" in written or OUR_TEXT in written["model_cfg"]["text_cfg"]


def refuse_url(name: str) -> None:
    """Refuse a URL, which would pass for a NAME:TAG."""
    if is_remote(name):
        raise ValueError(f"no model is read from a URL such as {name}: copy its folder here and give the path")
