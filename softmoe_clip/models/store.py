"""Load a model from a run, a model folder or open_clip's names; write a model folder, whole or not at all."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import nn

from softmoe_clip.models.alike import differences, shapes_in, shapes_of
from softmoe_clip.models.create import build, read_json
from softmoe_clip.models.hub import DESCRIPTION, WHOLE, fetch, is_ours, refuse_url
from softmoe_clip.models.replaced_folder import replaced_folder, restore_previous
from softmoe_clip.models.tokenizer_fit import check_tokenizer
from softmoe_clip.models.written import check_written, sides

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
# The architecture of a text tower from transformers travels along, so that the folder can be moved.
TRANSFORMERS_CONFIG = "config.json"
# open_clip's own order of names; the first one that is there is loaded.
FOREIGN_WEIGHTS = ("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")


class LoadedModel(NamedTuple):
    """What `load` gives: a model in eval mode, and what turns captions and pictures into its inputs.

    `model.encode_image((b, 3, r, r), normalize=True)` and `model.encode_text((b, l), normalize=True)` give unit vectors
    (b, z). `tokenizer` turns b strings into int64 (b, l); `transform` a PIL picture into float (3, r, r), as
    open_clip's preprocess_val does. `config` is what open_clip_config.json holds, None for a model of open_clip's own.
    """

    model: nn.Module
    tokenizer: Any
    transform: Callable
    config: dict | None

    @property
    def preprocess_cfg(self) -> dict:
        """open_clip's preprocessing settings: size, mean, std, interpolation, resize_mode."""
        return self.model.visual.preprocess_cfg

    @property
    def image_size(self) -> int:
        """Side of the square picture that the image tower takes, in pixels; ValueError where it takes no squares."""
        height, width = self.picture_size
        if height != width:
            raise ValueError(f"the image tower takes pictures of {height} x {width} pixels, which are no squares")
        return height

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the picture that the image tower takes, in pixels."""
        return sides(self.preprocess_cfg["size"])


def load(model: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> LoadedModel:
    """Load a run folder, a model folder, or an open_clip `NAME:TAG`, `hf-hub:...`, `local-dir:...`, in eval mode.

    Weights are moved to `device` and, where it is given, to `dtype`; `tokenizer` and `transform` stay on the CPU.
    Raises ValueError, one sentence, where there is no such model, or where a file of it is missing or damaged.
    """
    name = str(model)
    refuse_url(name)
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    restore_previous(folder)
    if name.startswith("local-dir:") or folder.exists():
        loaded = load_folder(folder)
    elif name.startswith("hf-hub:"):
        loaded = load_hub(name)
    elif ":" in name:
        loaded = load_open_clip(name)
    else:
        raise ValueError(f"no model at {name}: give a run folder, a model folder or an open_clip NAME:TAG")
    check_tokenizer(loaded.model, loaded.tokenizer, str(name))
    loaded.model.to(device=device, dtype=dtype).eval()
    return loaded


def load_encoder(
    model: str | Path,
    device: str = "auto",
    precision: str = "float32",
    batch_size: int = 64,
    num_workers: int | None = None,
):
    """Load a model and wrap it for evaluation and embedding; `auto` takes a GPU where there is one.

    `num_workers` processes decode pictures; if not given, four beside a GPU and none without.
    """
    from softmoe_clip.eval.encoder import Encoder

    device = usable_device(device)
    loaded = load(model, device)
    return Encoder(loaded.model, loaded.tokenizer, loaded.transform, device, precision, batch_size, num_workers)


def usable_device(device: str) -> str:
    """Choose for `auto`, a GPU where there is one; refuse a device that this machine or this build of torch lacks."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}): try cpu, cuda or auto") from None
    return device


def load_folder(folder: Path) -> LoadedModel:
    """Load a model folder (ours or open_clip's), or the newest model of a run folder."""
    folder, written = read_folder(folder)
    model = build(without_downloads(written, folder), source=str(folder / CONFIG_FILE))
    load_weights(model, folder)
    return LoadedModel(model, folder_tokenizer(folder, written["model_cfg"]["text_cfg"]), transform_of(model), written)


def load_hub(name: str) -> LoadedModel:
    """Load a model folder from the hub: ours as a folder, any other through open_clip."""
    folder, _ = described_on_hub(name)
    return load_open_clip(name) if folder is None else load_folder(fetch(name.removeprefix("hf-hub:"), WHOLE))


def described_on_hub(name: str) -> tuple[Path | None, dict]:
    """Fetch what describes a model on the hub: its checked config, and its folder where `save` wrote it."""
    folder, written = read_folder(fetch(name.removeprefix("hf-hub:"), [*DESCRIPTION, TRANSFORMERS_CONFIG]))
    return folder if is_ours(folder, written) else None, written


def read_folder(folder: Path) -> tuple[Path, dict]:
    """Return the folder that holds the model (a run keeps it in model/), and its checked config."""
    restore_previous(folder / "model")
    if not (folder / CONFIG_FILE).exists() and (folder / "model" / CONFIG_FILE).exists():
        folder = folder / "model"
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} is no model folder: it has no {CONFIG_FILE}, and no model/{CONFIG_FILE} as a run has"
        )
    config_file = folder / CONFIG_FILE
    written = read_json(config_file)
    check_written(written, str(config_file))
    return folder, written


def without_downloads(written: dict, folder: Path | None = None) -> dict:
    """Return a folder's config changed so that building from it fetches no weights for the towers.

    A text tower of transformers is described by a file in the folder, where there is one.
    """
    written = deepcopy(written)
    if "hf_model_name" in written["model_cfg"]["text_cfg"]:
        written["model_cfg"]["text_cfg"]["hf_model_pretrained"] = False
        if folder is not None and (folder / TRANSFORMERS_CONFIG).is_file():
            written["model_cfg"]["text_cfg"]["hf_model_name"] = str(folder)
    written["model_cfg"]["vision_cfg"]["timm_model_pretrained"] = False
    return written


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model from the weights file of its folder."""
    import open_clip
    from safetensors import SafetensorError

    file = next((folder / name for name in (WEIGHTS_FILE, *FOREIGN_WEIGHTS) if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}: the model folder is not whole, write or copy it again")
    if file.suffix == ".safetensors" and is_pickle(file):
        raise ValueError(f"{file} is a pickle, not safetensors: it could run code, so it is not loaded")
    try:
        open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
    except (SafetensorError, EOFError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}): write or copy it again") from None
    except UnpicklingError:
        raise ValueError(f"{file} holds more than tensors: it could run code, so it is not loaded") from None
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, StopIteration) as error:
        is_ours = file.name == WEIGHTS_FILE
        different = differences(shapes_of(model.state_dict()), shapes_in(file)) if is_ours else ""
        reason = different or " ".join(str(error).split())[:300]
        raise ValueError(f"{file} does not fit {CONFIG_FILE} beside it, or is damaged: {reason}") from None


def is_pickle(file: Path) -> bool:
    """Tell torch.save's archives and plain pickles from safetensors, which have a JSON object after eight bytes."""
    with file.open("rb") as opened:
        start = opened.read(9)
    return len(start) == 9 and start[8:] != b"{" and start.startswith((b"PK", b"\x80"))


def folder_tokenizer(folder: Path, text_cfg: dict):
    """Load our tokenizer where the folder holds one, else the one open_clip takes for such a folder."""
    from softmoe_clip.data_pipelines.tokenizers import MODEL_FILE, SETTINGS_FILE, check_vocabulary, load_tokenizer

    lone_model = (folder / MODEL_FILE).exists() and not text_cfg.get("hf_tokenizer_name")
    if (folder / SETTINGS_FILE).exists() or lone_model:
        return load_tokenizer(folder, text_cfg.get("context_length"))
    import open_clip

    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    if text_cfg.get("hf_tokenizer_name"):
        check_vocabulary(tokenizer.tokenizer, folder)
    return tokenizer


def load_open_clip(name: str) -> LoadedModel:
    """Load one of open_clip's own models by `NAME:TAG` or `hf-hub:...`."""
    import open_clip

    import softmoe_clip.plugin  # noqa: F401  makes our towers known to timm

    architecture, tag = (name, None) if name.startswith("hf-hub:") else name.rsplit(":", 1)
    if tag is not None:
        check_known("open_clip architecture", architecture, open_clip.list_models())
        check_known(f"tag of {architecture}", tag, open_clip.list_pretrained_tags_by_model(architecture))
    # open_clip only warns where the weights want another activation than the architecture has.
    quick_gelu = tag is not None and open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False)
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            architecture, pretrained=tag, output_dict=True, force_quick_gelu=quick_gelu, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # hubs fail in many ways, and each of them means the same to the user
        raise ValueError(f"cannot get the model {name}: {' '.join(str(error).split())[:300]}") from error
    return LoadedModel(model, tokenizer, transform, None)


def check_known(kind: str, name: str, known: list[str]) -> None:
    """Refuse an unknown name with the nearest right one."""
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0)
        raise ValueError(f"no {kind} is called {name!r}: " + (f"did you mean {near[0]!r}?" if near else "it has none."))


def transform_of(model: nn.Module) -> Callable:
    """Make the evaluation transform that open_clip makes for this model."""
    from softmoe_clip.data_pipelines.transforms import eval_transform

    return eval_transform(model.visual.preprocess_cfg)


def save(loaded: LoadedModel, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a model folder in open_clip's format: config, weights, tokenizer. An older model there is replaced at once.

    `weights` take the place of the model's own, where training has given these other names.
    Raises ValueError for a folder that holds something else, OSError for a full disk; either way nothing changes.
    """
    if loaded.config is None:
        raise ValueError(
            f"a foreign model has no config to write into {folder}: save one that `create_model` or a folder gave"
        )
    weights = loaded.model.state_dict() if weights is None else weights
    weights = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    with replaced_folder(Path(folder), CONFIG_FILE) as partial:
        (partial / CONFIG_FILE).write_text(json.dumps(loaded.config, indent=2) + "\n", encoding="utf-8")
        write_tensors(weights, partial / WEIGHTS_FILE)
        save_tokenizer(loaded.tokenizer, partial)
        if "hf_model_name" in loaded.config["model_cfg"]["text_cfg"]:
            loaded.model.text.config.save_pretrained(partial)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer of ours, or one of open_clip's (CLIP's own vocabulary is part of open_clip)."""
    if hasattr(tokenizer, "save"):
        tokenizer.save(folder)
    elif hasattr(tokenizer, "save_pretrained"):  # open_clip's own wrapper of transformers' tokenizers
        tokenizer.save_pretrained(folder)


def write_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file; a full disk is an OSError here, too."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from error
