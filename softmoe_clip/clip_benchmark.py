"""Run clip-benchmark's own command on any model that `softmoe_clip.load` takes.

    python -m softmoe_clip.clip_benchmark eval --model RUN --dataset wds/NAME --dataset_root DATA --output RESULT.json

The arguments are clip-benchmark's. It gets one more `--model_type`, softmoe_clip, and that is the default here:
`--model` is a run, a model folder, `hf-hub:...`, or an open_clip name whose tag is `--pretrained`.
"""

import argparse
import sys

import torch

from softmoe_clip.cli import fail

MODEL_TYPE = "softmoe_clip"


def main() -> None:
    """Run clip-benchmark with what the command line says; a mistake is one line and exit status 2."""
    try:
        sys.argv[1:] = with_defaults(sys.argv[1:])
        status = clip_benchmark_main()()
    except (ValueError, OSError) as error:
        status = fail(str(error))
    sys.exit(status)


def with_defaults(arguments: list[str]) -> list[str]:
    """Add our model type, and no tag, to the arguments of `eval` that say nothing about them."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", nargs="+", default=[])
    for name in ("--model_type", "--pretrained", "--pretrained_model", "--output"):
        parser.add_argument(name, nargs="*")
    given, _ = parser.parse_known_args(arguments)
    if arguments[:1] != ["eval"] or (given.model_type or [MODEL_TYPE]) != [MODEL_TYPE]:
        return arguments
    if given.output is None and any("/" in model for model in given.model):
        raise ValueError(
            "clip-benchmark names its result after the model, which does not work for a path: give it one with --output"
        )
    added = [] if given.model_type else ["--model_type", MODEL_TYPE]
    if given.pretrained is None and given.pretrained_model is None:
        added += ["--pretrained", ""]
    return [*arguments, *added]


def clip_benchmark_main():
    """Import clip-benchmark with our model type in it, and return its main function."""
    try:
        from clip_benchmark import models
        from clip_benchmark.metrics import zeroshot_classification
    except ImportError as error:
        raise ValueError(f"clip-benchmark cannot be used ({error}): pip install 'softmoe-clip[benchmark]'") from None
    import softmoe_clip.plugin  # noqa: F401  so that --model_type open_clip knows our towers, too

    models.TYPE2FUNC[MODEL_TYPE] = load_softmoe_clip
    models.MODEL_TYPES.append(MODEL_TYPE)  # read when clip_benchmark.cli is imported
    mend_accuracy(zeroshot_classification)
    from clip_benchmark.cli import main

    return main


def load_softmoe_clip(model_name: str, pretrained: str = "", cache_dir: str | None = None, device: str = "cpu"):
    """Load what `softmoe_clip.load` takes, in the order that clip-benchmark wants: model, transform, tokenizer."""
    from softmoe_clip.models.store import load

    if cache_dir is not None:
        raise ValueError("--model_cache_dir is for --model_type open_clip: set HF_HUB_CACHE instead")
    loaded = load(f"{model_name}:{pretrained}" if pretrained else model_name, device)
    return loaded.model, loaded.transform, loaded.tokenizer


def mend_accuracy(zeroshot_classification) -> None:
    """Put our top-k accuracy in place of clip-benchmark's where numpy (2.4 and later) refuses what that one does."""
    try:
        zeroshot_classification.accuracy(torch.eye(2), torch.arange(2))
    except TypeError:
        zeroshot_classification.accuracy = accuracy


def accuracy(output: torch.Tensor, target: torch.Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """Return, for each k, the share of rows whose target is among their k largest entries."""
    hits = output.topk(max(topk), dim=1).indices == target[:, None]
    return [hits[:, :k].any(dim=1).sum().item() / len(target) for k in topk]


if __name__ == "__main__":
    main()
