"""The verbs that measure a model and search with it."""

from pathlib import Path
from typing import Annotated

import typer

from softmoe_clip.verbs.arguments import BatchSize, Device, Json, Model, Precision, Shards, Workers


def eval(
    model: Model,
    suite: Annotated[Path, typer.Option(help="YAML that lists the tasks, as configs/suites/*.yaml")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write, for compare")] = None,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: BatchSize = 64,
    workers: Workers = None,
):
    """Score a model: zero-shot, retrieval, caption pairs.

    Example: softmoe-clip eval runs/a --suite configs/suites/flickr8k.yaml
    """
    from softmoe_clip.config import find_config
    from softmoe_clip.eval.config import load_suite
    from softmoe_clip.eval.results import check_place, print_results
    from softmoe_clip.launch import keep_cpu_memory

    tasks = load_suite(find_config(suite))
    if out:
        check_place(out)
    keep_cpu_memory()
    from softmoe_clip.eval.suites import run_suite
    from softmoe_clip.models.store import load_encoder

    results = run_suite(load_encoder(model, device, precision, batch_size, workers), tasks, model_name=model)
    print_results(results)
    if out:
        results.save(out)


def compare(results: Annotated[list[Path], typer.Argument(help="JSON files that eval --out wrote")]):
    """Print several result files side by side.

    Example: softmoe-clip compare soft.json dense.json
    """
    from softmoe_clip.eval.results import distinct_names, load_results, print_comparison

    print_comparison([load_results(path) for path in results], names=distinct_names(results))


def embed(
    model: Model,
    shards: Shards,
    out: Annotated[Path, typer.Argument(help="folder to write")],
    features: Annotated[str, typer.Option(help="embedding: to search; trunk: to train on (LiT)")] = "embedding",
    dtype: Annotated[str, typer.Option(help="float32 or float16, on disk")] = "float32",
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: BatchSize = 64,
    workers: Workers = None,
):
    """Write embeddings of pictures and captions.

    The layout is clip-retrieval's.

    Example: softmoe-clip embed runs/a shards/val embeddings
    """
    from softmoe_clip.launch import keep_cpu_memory

    keep_cpu_memory()
    from softmoe_clip.models.store import load_encoder
    from softmoe_clip.search.embed import embed

    encoder = load_encoder(model, device, precision, batch_size, workers)
    report = embed(encoder, shards, out, model_name=model, dtype=dtype, features=features)
    print(f"{report.num_rows:8,} pictures  {report.out}")
    if report.skipped:
        print(f"{len(report.skipped):8,} skipped   listed in meta.json")


def index(
    embeddings: Annotated[Path, typer.Argument(help="folder that embed, or clip-retrieval, wrote")],
    out: Annotated[Path | None, typer.Option(help="folder; beside the embeddings if not given")] = None,
):
    """Build the search index over embeddings.

    Example: softmoe-clip index embeddings
    """
    from softmoe_clip.search.index import index

    print(index(embeddings, out))


def search(
    index: Annotated[Path, typer.Argument(help="folder that index was given, or its --out")],
    query: Annotated[str | None, typer.Argument(help="what to look for, in words")] = None,
    image: Annotated[Path | None, typer.Option(help="a picture to look for its like")] = None,
    k: Annotated[int, typer.Option("-k", help="how many hits")] = 10,
    model: Annotated[str | None, typer.Option(help="the model to ask with, if not the one in meta.json")] = None,
    json: Json = False,
):
    """Ask an index for pictures, in words or by a picture.

    Example: softmoe-clip search embeddings "a dog on the beach" -k 5
    """
    from softmoe_clip.search.query import print_hits, search

    print_hits(search(index, query, image, k, model=model), as_json=json)
