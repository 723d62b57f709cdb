"""Everything once: pictures to shards, a trained model, its numbers, an index to search, and a report to look at."""

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from softmoe_clip.config import TrainConfig, find_config
from softmoe_clip.data_pipelines.new_folder import refuse_file
from softmoe_clip.data_pipelines.strict import load_strict
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.eval.config import SuiteConfig, TaskConfig, load_suite
from softmoe_clip.training.run_folder import say

SCENE_QUERIES = ("a striped red star", "a blue circle left of a yellow square")
# Photographs may be mirrored and cropped closely; scenes may not, since their captions say what is left of what. Nor
# have photographs captions of several sentences, which take longer to read.
PHOTO_SETTINGS = ["data.flip=true", "data.crop_scale=[0.4,1.0]", "model.context_length=null"]
MOST_PASSES = 60


def demo(data: str | None, out: str | Path) -> Path:
    """Pack or draw pictures, train on them, measure, embed, index, search and report; return the report's path.

    A demo that was broken off goes on where it was. Raises ValueError when OUT holds the demo of other data.
    """
    out = Path(out)
    source = "scenes" if data is None else str(Path(data).resolve())
    claim(out, source)
    with stage("1/6  pictures to shards"):
        make_shards(data, out / "shards")
        make_tokenizer(out)
    with stage("2/6  training"):
        from softmoe_clip.training.loop import train

        train(demo_config(data, out))

    from softmoe_clip.eval.results import print_results
    from softmoe_clip.eval.suites import run_suite
    from softmoe_clip.models.store import load_encoder
    from softmoe_clip.report.html import write_report
    from softmoe_clip.search.embed import embed
    from softmoe_clip.search.index import index
    from softmoe_clip.search.query import print_hits, search

    encoder = load_encoder(out / "run", device="auto", batch_size=128)
    held_out = held_out_shards(out)
    with stage("3/6  evaluation on held-out pictures"):
        results = run_suite(encoder, demo_suite(data, out), model_name=str(out / "run"))
        results.save(out / "results.json")
        print_results(results)
    with stage("4/6  embeddings and index"):
        if not (out / "embeddings").exists():
            embed(encoder, str(held_out), out / "embeddings", model_name=str(out / "run"))
        index(out / "embeddings")
    with stage("5/6  search"):
        for query in SCENE_QUERIES if data is None else captions_of(held_out, 2):
            print(f"\n{query!r} finds")
            print_hits(search(out / "embeddings", query, k=3, loaded=encoder))
    with stage("6/6  report"):
        report = write_report(out / "run", encoder, str(held_out), results, out / "report.html")
    ask = f"softmoe-clip search {shlex.quote(str(out / 'embeddings'))} WORDS"
    print(f"\nreport  {report}\nmodel   {out / 'run' / 'model'}\nsearch  {ask}")
    return report


def claim(out: Path, source: str) -> None:
    """Note which data the demo in this folder is about; refuse a folder that is about other data, or about none."""
    note = out / "demo.json"
    refuse_file(out, "give another folder with --out")
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))["source"]
        if before != source:
            raise ValueError(f"{out} holds the demo of {before}: give another folder with --out, or remove it")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds something else than a demo: give another folder with --out")
    else:
        if source != "scenes" and not Path(source).exists():
            raise ValueError(f"{source} does not exist: give a folder of pictures with captions, or a table of them")
        out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"source": source}) + "\n", encoding="utf-8")


def make_shards(data: str | None, out: Path) -> None:
    """Draw scenes, or pack the user's pictures, unless it is done already."""
    if out.exists():
        return
    if data is None:
        from softmoe_clip.data_pipelines.scenes import write_scenes

        write_scenes(out)
        return
    from softmoe_clip.data_pipelines.pack import pack

    try:
        report = pack(data, out, roles=True)
        if "train" not in report.counts or not report.counts.keys() & {"val", "test"}:
            shutil.rmtree(out)
            reason = f" ({report.skipped[0]['name']}: {report.skipped[0]['reason']})" if report.skipped else ""
            raise ValueError(f"{data} has too few pictures to train on some and hold out others{reason}: add pictures")
    except BaseException:
        # Nothing half-written stays, except finished shards, with which the same command continues.
        if not out.with_name(f"{out.name}.partial").exists():
            (out.parent / "demo.json").unlink(missing_ok=True)
            out.parent.rmdir()
        raise
    for split, count in report.counts.items():
        print(f"{count:8,} pictures  {split}")
    if report.skipped:
        print(f"{len(report.skipped):8,} skipped   listed in {out}/*/skipped.jsonl")


def make_tokenizer(out: Path) -> None:
    """Train a sentencepiece tokenizer on the training captions, unless it is done already."""
    from softmoe_clip.data_pipelines.samples import all_captions
    from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer

    if not (out / "tokenizer.model").exists():
        train_tokenizer(all_captions(ShardSet.open(str(out / "shards/train"))), out / "tokenizer.model")


def demo_config(data: str | None, out: Path) -> TrainConfig:
    """Read configs/demo.yaml for the shards of this demo."""
    num_pairs = len(ShardSet.open(str(out / "shards/train")))
    settings = [
        place("out", out / "run"),
        place("data.train", out / "shards/train"),
        place("data.val", held_out_shards(out)),
        place("tokenizer", out / "tokenizer.model"),
        *([] if data is None else PHOTO_SETTINGS),
    ]
    config = load_strict(TrainConfig, find_config("configs/demo.yaml"), settings)
    # A batch larger than the set would hold a picture twice, as its own wrong answer; and a small set is soon known.
    batch_size = max(2, min(config.batch_size, num_pairs))
    steps = min(config.steps, -(-MOST_PASSES * num_pairs // batch_size))
    fitting = [f"batch_size={batch_size}", f"steps={steps}", f"optim.warmup={min(config.optim.warmup, steps // 5)}"]
    return load_strict(TrainConfig, find_config("configs/demo.yaml"), [*settings, *fitting])


def place(key: str, path: Path) -> str:
    """Write an override in quotes: a folder's name may hold what means something in YAML."""
    return f"{key}={json.dumps(str(path), ensure_ascii=False)}"


def held_out_shards(out: Path) -> Path:
    """Return the shards that the numbers are measured on: the test split where there is one, else val."""
    for split in ("test", "val"):
        if (path := out / "shards" / split).exists():
            return path
    raise ValueError(f"{out / 'shards'} has neither test nor val to measure on: remove {out} and run the demo again")


def demo_suite(data: str | None, out: Path) -> SuiteConfig:
    """Return what is measured: five kinds of numbers on scenes, retrieval on one's own pictures."""
    if data is None:
        return load_suite(find_config("configs/suites/scenes.yaml"), [place("root", out / "shards")])
    name = (Path(data).parent if Path(data).is_file() else Path(data)).resolve().name
    return SuiteConfig((TaskConfig("retrieval", name, str(held_out_shards(out))),))


def captions_of(shards: Path, count: int) -> list[str]:
    """Return captions of the first few pictures, as example queries."""
    from softmoe_clip.data_pipelines.samples import all_captions

    captions = all_captions(ShardSet.open(str(shards)))
    return [caption for caption, _ in zip(captions, range(count), strict=False)]


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Announce a stage and say how long it took."""
    say(f"\n{title}")
    begin = perf_counter()
    yield
    say(f"     {perf_counter() - begin:.0f} s")
