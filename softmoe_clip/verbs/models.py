"""The verbs from model to model."""

from pathlib import Path
from typing import Annotated

import typer

from softmoe_clip.verbs.arguments import BatchSize, Device, Json, Model, Precision


def summary(
    model: Annotated[
        str, typer.Argument(help="an architecture's name or JSON file; a run, a model folder, or open_clip's NAME:TAG")
    ],
    json: Json = False,
):
    """Count parameters, FLOPs and memory of both towers.

    Nothing is built: the largest models are counted on any machine.

    Example: softmoe-clip summary SoftMoE-H-14
    """
    from softmoe_clip.models.summary import print_summary, summary

    print_summary(summary(model), as_json=json)


def upcycle(
    source: Annotated[str, typer.Argument(help="a dense model: folder, run, open_clip NAME:TAG, timm:NAME")],
    out: Annotated[Path, typer.Argument(help="model folder to write")],
    num_experts: Annotated[int, typer.Option(help="in each layer")],
    layers: Annotated[str, typer.Option(help="last_half, or blocks such as 6,7,9-11")] = "last_half",
    mode: Annotated[
        str,
        typer.Option(help="copy, noise (told apart), centroids (slots fitted to --pictures), shared (beside the MLP)"),
    ] = "copy",
    slots_per_expert: Annotated[int, typer.Option(help="in each layer")] = 1,
    pictures: Annotated[str | None, typer.Option(help="shards or a folder to measure the change on")] = None,
    text: Annotated[
        bool, typer.Option("--text", help="experts in the text tower, too; it must be bidirectional")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the slots, and of mode noise")] = 0,
):
    """Make a Soft MoE model of a dense one.

    MLPs of its image tower, and with --text of its text tower, become experts.

    Example: softmoe-clip upcycle ViT-B-16:openai upcycled --num-experts 32 --pictures my_pictures
    """
    from softmoe_clip.models.upcycle import to_train_on, upcycle

    done = upcycle(source, out, num_experts, layers, mode, slots_per_expert, pictures, text, seed)
    for tower, change in zip(done._fields, done, strict=True):
        if change is not None:
            print(f"{tower} embeddings before and after, cosine: mean {change.mean:.4f}, least {change.least:.4f}")
            print(f"on {change.measured_on}")
    print(f"train it on as the dense model, with {to_train_on(out)}")


def soup(
    models_and_out: Annotated[list[str], typer.Argument(metavar="MODEL... OUT", help="two models or more, then OUT")],
    weights: Annotated[str | None, typer.Option(help="one for each model, as in 0.7,0.3; equal if not given")] = None,
    suite: Annotated[Path | None, typer.Option(help="greedy: keep a model only where --metric gets no worse")] = None,
    metric: Annotated[
        str | None, typer.Option(help="one of the suite, as in retrieval/x/text_to_image/recall@1")
    ] = None,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: BatchSize = 64,
):
    """Average the weights of models that share a start.

    Uniform, weighted (WiSE-FT), or greedy with a suite.

    Example: softmoe-clip soup runs/a runs/b soup --weights 0.7,0.3
    """
    *models, out = models_and_out
    if suite is None:
        if (metric, device, precision, batch_size) != (None, "auto", "float32", 64):
            raise ValueError(
                "--metric, --device, --precision and --batch-size are for --suite, which says what to measure"
            )
        from softmoe_clip.models.soup import numbers, soup

        print(soup(models, out, numbers(weights)))
        return
    if weights is not None:
        raise ValueError("soup takes --weights or --suite, not both: greedy soups count all models the same")
    from softmoe_clip.config import find_config
    from softmoe_clip.eval.config import load_suite
    from softmoe_clip.launch import keep_cpu_memory

    tasks = load_suite(find_config(suite))
    keep_cpu_memory()
    from softmoe_clip.models.soup import greedy_soup_by_suite

    print(" ".join(greedy_soup_by_suite(models, out, tasks, metric, device, precision, batch_size)))


def export_onnx(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder to write")],
):
    """Write both towers as ONNX files, and check them.

    Tokenizer and preprocessing go with them; onnxruntime must give what torch gives.

    Example: softmoe-clip export-onnx runs/a onnx
    """
    from softmoe_clip.models.onnx import export_onnx

    image, text = export_onnx(model, out)
    print(f"{out}: onnxruntime and torch differ by at most {image:.1e} (image), {text:.1e} (text)")
