"""Write both towers as ONNX files, with all that their user must know, and check them in onnxruntime."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_clip.data_pipelines.new_folder import new_folder, refuse_existing
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.tokenizers import OpenClipTokenizer
from softmoe_clip.models.store import LoadedModel, load, save_tokenizer
from softmoe_clip.moe.assignment import BaseMoE
from softmoe_clip.moe.sparse import SparseMoE, routed_together

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
SETTINGS_FILE = "softmoe_onnx.json"
# Largest difference between the numbers of two unit vectors, ours and onnxruntime's.
TOLERANCE = 1e-4
PREPROCESSING = ("size", "mean", "std", "interpolation", "resize_mode")
CAPTIONS = ["a photo of a cat", "", "two dogs, one of them asleep, in front of a red house"]


class Differences(NamedTuple):
    """The largest difference between torch and onnxruntime that was found in the embeddings of each tower."""

    image: float
    text: float


class UnitVectors(nn.Module):
    """One tower of a model, as what its ONNX file computes."""

    def __init__(self, model: nn.Module, tower: str):
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, inputs: Tensor) -> Float[Tensor, "b z"]:
        """Embed pictures or captions."""
        encode = self.model.encode_image if self.tower == "image" else self.model.encode_text
        return encode(inputs, normalize=True)


def export_onnx(model: str | Path, out: str | Path) -> Differences:
    """Write `image.onnx`, `text.onnx`, the tokenizer, and in `softmoe_onnx.json` preprocessing and scale, into `out`.

    Both files take any number of rows; weights of more than 2 GB lie in a file beside them. Raises ValueError, and
    leaves nothing behind, where onnxruntime's embeddings differ from torch's by more than 1e-4.
    """
    check_installed()
    refuse_existing(out)
    loaded = load(model)
    check_routers(loaded.model)
    settings = settings_of(loaded)
    differences = {}
    with new_folder(out) as folder, progress("export-onnx", total=4, unit="steps") as advance:
        write_tokenizer(loaded.tokenizer, folder)
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for tower in Differences._fields:
            file = folder / f"{tower}.onnx"
            module = UnitVectors(loaded.model, tower).eval()
            write_tower(module, example(loaded, tower, 2), file)
            advance(note=f"{tower} tower written")
            differences[tower] = difference(module, example(loaded, tower, 3), file)
            advance(note=f"{tower} tower checked")
    return Differences(**differences)


def check_installed() -> None:
    """Refuse to start without the packages of the extra `onnx`."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f"export-onnx needs {', '.join(missing)}: pip install 'softmoe-clip[onnx]'")


def check_routers(model: nn.Module) -> None:
    """Refuse routing groups of several pictures, since an ONNX file takes them one by one, and what it cannot do."""
    for layer in model.modules():
        if isinstance(layer, BaseMoE):
            raise ValueError(f"{layer.label} has the router base, whose assignment no ONNX file computes: take another")
    if layer := routed_together(model):
        raise ValueError(
            f"{layer.label} is a {type(layer).__name__} that routes {layer.group_size} pictures together "
            "(group_size): what such a model says of a picture depends on its neighbours, so it is not exported"
        )


def settings_of(loaded: LoadedModel) -> dict:
    """Return what a user of the files needs: names and sizes of inputs, preprocessing, scale and bias."""
    missing = [name for name in PREPROCESSING if loaded.preprocess_cfg.get(name) is None]
    if missing:
        raise ValueError(f"the model does not say how it sees pictures ({', '.join(missing)}): it can't be guessed")
    bias = getattr(loaded.model, "logit_bias", None)
    return {
        "image": {"file": "image.onnx", "input": "pixels", "output": "image_embedding"}
        | {name: loaded.preprocess_cfg[name] for name in PREPROCESSING}
        # With resize_mode longest pictures are filled up to a square; open_clip's default is black.
        | {"fill_color": loaded.preprocess_cfg.get("fill_color", 0)},
        "text": {
            "file": "text.onnx",
            "input": "token_ids",
            "output": "text_embedding",
            "context_length": example(loaded, "text", 1).shape[1],
            # open_clip's SigLIP models take punctuation and capitals away before their transformers' tokenizer.
            "cleaning": cleaning_of(loaded.tokenizer),
        },
        "logit_scale": loaded.model.logit_scale.exp().item(),
        "logit_bias": None if bias is None else bias.item(),
    }


def cleaning_of(tokenizer: Any) -> str | None:
    """Name what open_clip's tokenizers do to a caption first; None for a tokenizer that is whole without it."""
    # Ours hold the tokenizer of open_clip; that one may hold another, of transformers.
    cleaning = next(
        (t.clean_fn for t in (tokenizer, getattr(tokenizer, "tokenizer", None)) if hasattr(t, "clean_fn")), None
    )
    return None if cleaning is None else cleaning.__name__.removeprefix("_clean_")


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write what `load_tokenizer` reads again; of CLIP's BPE only the settings, the vocabulary is part of open_clip."""
    from open_clip import SimpleTokenizer

    ours = OpenClipTokenizer(tokenizer.context_length) if isinstance(tokenizer, SimpleTokenizer) else tokenizer
    save_tokenizer(ours, folder)


def example(loaded: LoadedModel, tower: str, rows: int) -> Tensor:
    """Draw noise as pictures; as captions, real ones and as many rows of random ids."""
    generator = torch.Generator().manual_seed(rows)
    if tower == "image":
        return torch.randn(rows, 3, *loaded.picture_size, generator=generator)
    token_ids = torch.as_tensor(loaded.tokenizer(CAPTIONS[:rows]))
    vocab_size = getattr(loaded.model, "text", loaded.model).vocab_size
    return torch.cat([token_ids, torch.randint(vocab_size, token_ids.shape, generator=generator)])


def write_tower(module: UnitVectors, inputs: Tensor, file: Path) -> None:
    """Trace a tower with torch.export and translate it; the exporter says nothing, but what it refuses is told."""
    try:
        with quiet_optimizer():
            program = torch.onnx.export(
                module,
                (inputs,),
                dynamo=True,
                verbose=False,
                input_names=["pixels" if module.tower == "image" else "token_ids"],
                # Not `embedding`: text towers name a result of their own so.
                output_names=[f"{module.tower}_embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table=translations(module),
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"the {module.tower} tower cannot be written as ONNX: {reason}") from error
    program.save(file)


def translations(module: nn.Module) -> dict:
    """Return what sparse routers need beyond the exporter's own translations: a sort that keeps the order of ties."""
    if not any(isinstance(layer, SparseMoE) for layer in module.modules()):
        return {}
    from onnxscript.function_libs.torch_lib.ops.core import aten_sort

    return {torch.ops.aten.sort.stable: aten_sort}  # ONNX's TopK, which is stable by its definition


@contextmanager
def quiet_optimizer() -> Iterator[None]:
    """Keep onnxscript from warning of each TopK that it does not compute beforehand: nobody can act on it."""
    logger = logging.getLogger("onnxscript.optimizer._constant_folding")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def difference(module: UnitVectors, inputs: Tensor, file: Path) -> float:
    """Measure how far onnxruntime's embeddings lie from torch's; ValueError where that is too far."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    with torch.inference_mode():
        expected = module(inputs).numpy()
    largest = float(np.abs(found - expected).max())
    if not largest <= TOLERANCE:  # NaN, too
        raise ValueError(
            f"onnxruntime's embeddings from the {module.tower} tower differ from torch's by {largest:.1e}, more than "
            f"{TOLERANCE:.0e}: nothing was written"
        )
    return largest
