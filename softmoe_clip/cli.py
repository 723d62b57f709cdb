"""The command line: parse, call one function, print. A mistake is one line on stderr and exit status 2."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Image-text contrastive models with Soft MoE towers: train, evaluate, search.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
EXIT_MISTAKE, EXIT_STOPPED = 2, 75  # 75: EX_TEMPFAIL, the run saved its state and goes on when started again

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU where there is one")]
Precision = Annotated[str, typer.Option(help="float32, bf16 or fp16")]
BatchSize = Annotated[int, typer.Option(help="pictures, or texts, at a time")]


@app.command()
def demo(
    data: Annotated[str | None, typer.Option(help="your own pictures; drawn scenes if not given")] = None,
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("demo"),
):
    """Do everything once: pack, train, eval, embed, index, search, report.

    Example: softmoe-clip demo --data my_pictures --out demo
    """
    from softmoe_clip.launch import tune_cpu_memory

    tune_cpu_memory()
    from softmoe_clip.demo import demo

    demo(data, out)


@app.command()
def pack(
    source: str,
    out: Path,
    split: Annotated[str | None, typer.Option(help="only this split of the source, straight into OUT")] = None,
    shard_size: Annotated[int, typer.Option(help="pictures in a shard")] = 1000,
):
    """Turn pictures with captions into shards.

    Example: softmoe-clip pack my_pictures shards
    """
    from softmoe_clip.data_pipelines.pack import pack

    report = pack(source, out, split=split, shard_size=shard_size)
    for name, count in report.counts.items():
        print(f"{count:8,} pictures  {name}")
    if report.skipped:
        print(f"{len(report.skipped):8,} skipped   listed in skipped.jsonl")


@app.command()
def check(shards: str):
    """Read every sample of a shard set once and list what is wrong.

    Example: softmoe-clip check shards/train
    """
    from softmoe_clip.data_pipelines.check import check

    report = check(shards)
    for finding in report.findings:
        print(f"{finding['severity']}  {finding['shard']}  {finding['key']}  {finding['reason']}")
    print(f"{report.num_samples:,} samples, {len(report.findings):,} findings")
    raise typer.Exit(1 if any(f["severity"] == "error" for f in report.findings) else 0)


@app.command()
def train_tokenizer(shards: str, out: Path, vocab_size: Annotated[int, typer.Option(help="pieces")] = 2000):
    """Make a sentencepiece tokenizer from the captions of shards.

    Example: softmoe-clip train-tokenizer shards/train tokenizer.model
    """
    from softmoe_clip.data_pipelines.samples import all_captions
    from softmoe_clip.data_pipelines.tar_index import ShardSet
    from softmoe_clip.data_pipelines.tokenizers import train_tokenizer

    train_tokenizer(all_captions(ShardSet.open(shards)), out, vocab_size)


@app.command()
def train(
    config: str,
    overrides: Annotated[list[str] | None, typer.Argument(help="settings, as in optim.lr=0.0005")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="print parameters, memory and expected time, and stop")] = False,
):
    """Train a model, or go on exactly where its run stopped.

    Example: softmoe-clip train configs/demo.yaml out=runs/a data.train=shards/train steps=500
    """
    from softmoe_clip.config import TrainConfig, find_config
    from softmoe_clip.data_pipelines.strict import load_strict
    from softmoe_clip.launch import tune_cpu_memory

    settings = load_strict(TrainConfig, find_config(config), overrides or [])
    tune_cpu_memory()
    if plan:
        from softmoe_clip.training.plan import print_plan

        print_plan(settings)
        return
    from softmoe_clip.training.loop import Stopped, train

    try:
        train(settings)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(EXIT_STOPPED) from None


@app.command()
def config(config: str, overrides: Annotated[list[str] | None, typer.Argument()] = None):
    """Print a config with every setting it leaves to its default.

    Example: softmoe-clip config configs/demo.yaml optim.lr=0.0005
    """
    from omegaconf import OmegaConf

    from softmoe_clip.config import TrainConfig, find_config
    from softmoe_clip.data_pipelines.strict import load_strict
    from softmoe_clip.training.run_folder import as_tree

    print(
        OmegaConf.to_yaml(OmegaConf.create(as_tree(load_strict(TrainConfig, find_config(config), overrides or [])))),
        end="",
    )


@app.command()
def eval(
    model: str,
    suite: Annotated[Path, typer.Option(help="YAML that lists the tasks")],
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: BatchSize = 64,
):
    """Score a model: zero-shot classification and retrieval.

    Example: softmoe-clip eval runs/a --suite configs/suites/flickr8k.yaml
    """
    from softmoe_clip.config import find_config
    from softmoe_clip.eval.results import print_results
    from softmoe_clip.eval.suites import load_suite, run_suite
    from softmoe_clip.models.store import load_encoder

    tasks = load_suite(find_config(suite))
    results = run_suite(load_encoder(model, device, precision, batch_size), tasks)
    print_results(results)
    if out:
        results.save(out)


@app.command()
def compare(results: list[Path]):
    """Print several result files side by side.

    Example: softmoe-clip compare soft.json dense.json
    """
    from softmoe_clip.eval.results import load_results, print_comparison

    print_comparison([load_results(path) for path in results], names=[path.stem for path in results])


@app.command()
def soup(
    models_and_out: Annotated[list[str], typer.Argument(metavar="MODEL... OUT", help="two models or more, then OUT")],
    weights: Annotated[str | None, typer.Option(help="one for each model, as in 0.7,0.3; equal if not given")] = None,
    suite: Annotated[Path | None, typer.Option(help="greedy: keep a model only where --metric gets no worse")] = None,
    metric: Annotated[str | None, typer.Option(help="a metric of the suite; larger is better")] = None,
):
    """Average the weights of models that share a start: uniform, weighted (WiSE-FT), or greedy with a suite.

    Example: softmoe-clip soup runs/a runs/b soup --weights 0.7,0.3
    """
    from softmoe_clip.models.soup import greedy_soup_by_suite, numbers, soup

    *models, out = models_and_out
    if suite is None:
        print(soup(models, out, numbers(weights)))
    else:
        print(" ".join(greedy_soup_by_suite(models, out, suite, metric)))


@app.command()
def embed(
    model: str,
    shards: str,
    out: Path,
    features: Annotated[str, typer.Option(help="embedding: to search; trunk: to train on (LiT)")] = "embedding",
    dtype: Annotated[str, typer.Option(help="float32 or float16, on disk")] = "float32",
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: BatchSize = 64,
):
    """Write the embeddings of pictures and captions in clip-retrieval's layout.

    Example: softmoe-clip embed runs/a shards/val embeddings
    """
    from softmoe_clip.models.store import load_encoder
    from softmoe_clip.search.embed import embed

    encoder = load_encoder(model, device, precision, batch_size)
    embed(encoder, shards, out, model_name=model, dtype=dtype, features=features)


@app.command()
def index(
    embeddings: Path,
    out: Annotated[Path | None, typer.Option(help="folder; beside the embeddings if not given")] = None,
):
    """Build the search index over embeddings.

    Example: softmoe-clip index embeddings
    """
    from softmoe_clip.search.index import index

    print(index(embeddings, out))


@app.command()
def search(
    index: Path,
    query: Annotated[str | None, typer.Argument(help="what to look for, in words")] = None,
    image: Annotated[Path | None, typer.Option(help="a picture to look for its like")] = None,
    k: Annotated[int, typer.Option("-k", help="how many hits")] = 10,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
):
    """Ask an index for pictures, in words or by a picture.

    Example: softmoe-clip search embeddings "a dog on the beach" -k 5
    """
    from softmoe_clip.search.query import print_hits, search

    print_hits(search(index, query, image, k), as_json=json)


@app.command()
def summary(
    model: Annotated[str, typer.Argument(help="an architecture's name or JSON, a model, a run")],
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
):
    """Count parameters, FLOPs and memory of both towers, without building them.

    Example: softmoe-clip summary SoftMoE-H-14
    """
    from softmoe_clip.models.summary import print_summary, summary

    print_summary(summary(model), as_json=json)


@app.command()
def upcycle(
    source: Annotated[str, typer.Argument(help="a dense model: folder, run, open_clip NAME:TAG, timm:NAME")],
    out: Path,
    num_experts: Annotated[int, typer.Option(help="in each layer")],
    layers: Annotated[str, typer.Option(help="last_half, or blocks such as 6,7,9-11")] = "last_half",
    mode: Annotated[str, typer.Option(help="copy, noise (copies told apart) or shared (beside the MLP)")] = "copy",
    slots_per_expert: Annotated[int, typer.Option(help="in each layer")] = 1,
    pictures: Annotated[str | None, typer.Option(help="shards or a folder to measure the change on")] = None,
):
    """Make a Soft MoE model of a dense one: MLPs of its image tower become experts.

    Example: softmoe-clip upcycle ViT-B-16:openai upcycled --num-experts 32 --pictures my_pictures
    """
    from softmoe_clip.models.upcycle import upcycle

    done = upcycle(source, out, num_experts, layers, mode, slots_per_expert, pictures)
    print(f"image embeddings before and after, cosine: mean {done.mean:.4f}, least {done.least:.4f}")
    print(f"on {done.measured_on}")


def main() -> None:
    """Run the command line; what a user got wrong becomes one line on stderr and exit status 2."""
    from typer.exceptions import TyperException

    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        status = 130
    except (TyperException, ValueError, OSError) as error:
        status = fail(error.format_message() if isinstance(error, TyperException) else str(error))
    sys.exit(status)


def fail(message: str) -> int:
    """Print a mistake as one line and return its exit status."""
    print("softmoe-clip: " + " ".join(message.split()), file=sys.stderr)
    return EXIT_MISTAKE
