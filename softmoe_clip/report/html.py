"""One self-contained page about a model: its numbers, how it was trained, what it finds, and what its slots look at."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from softmoe_clip.data_pipelines.new_folder import write_whole
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.report import sections
from softmoe_clip.report.examples import Pool, embed_pool
from softmoe_clip.report.numbers import TIMES, all_figures, headline_figures, percent
from softmoe_clip.report.pictures import read_picture
from softmoe_clip.report.run_record import Numbers, RunRecord, read_numbers, read_run

NUM_ROUTED_PICTURES = 5
SECTIONS = {
    "headline": ("numbers", "Numbers"),
    "training": ("training", "Training"),
    "found": ("search", "Words to pictures"),
    "described": ("captions", "Pictures to words"),
    "classes": ("classes1", "Class by class"),
    "layers": ("routing", "What the slots look at"),
}


def write_report(
    run: str | Path | None, loaded, shards_for_examples=None, results=None, out: str | Path | None = None
) -> Path:
    """Write `report.html` and return its path.

    `run` is a run folder, a model folder, or None; whatever it does not hold is left out of the page. `loaded` is a
    LoadedModel or an Encoder, `results` are Results or their JSON as a dict (None: all of RUN/eval/*.json). OUT is a
    file, or a folder (default: `run`).
    """
    record, numbers = read_run(run), read_numbers(results, run)
    shards = open_shards(shards_for_examples) if shards_for_examples else None
    pool = embed_pool(encoder_of(loaded), shards) if shards else None
    page = {**head(record, numbers, loaded, run), **numbers_of(numbers)}
    page["training"] = sections.training_section(record, numbers, setting(record.config, "loss"))
    page["classes"] = sections.classes_section(numbers)
    if pool:
        page["pool_size"], page["num_texts"] = len(pool.samples), len(pool.texts)
        page["found"] = sections.search_section(pool, shards)
        page["described"] = sections.captions_section(pool, shards)
        page["layers"] = sections.routing_section(loaded, routed_pictures(pool, shards))
        num_layers = len(soft_layers(loaded.model.visual))
        if len(page["layers"]) < num_layers:
            page["layers_left_out"] = f"Shown are {len(page['layers'])} of {num_layers} layers, evenly spread."
    page["made"] = made(record, numbers)
    page["sections"] = [place for name, place in SECTIONS.items() if page.get(name)] + [("made", "How it was made")]
    file = out_file(out, run)
    write_whole(file, render(page))
    return file


def open_shards(pattern) -> ShardSet:
    """Open a shard set named by a pattern, a list or a Path; one that is open already stays as it is."""
    if isinstance(pattern, ShardSet):
        return pattern
    return ShardSet.open(str(pattern) if isinstance(pattern, Path) else pattern)


def render(page: dict) -> str:
    """Fill the template; every value is escaped but the SVG charts, which plots.py escapes itself."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    def trusted(value):
        if isinstance(value, dict):
            return {key: trusted(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [trusted(inner) for inner in value]
        return Markup(value) if isinstance(value, str) and value.startswith("<svg ") else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page["training"] = trusted(page["training"])
    return environment.get_template("page.html.j2").render(page)


def head(record: RunRecord, numbers: Numbers, loaded, run) -> dict:
    """Title, opening sentences and the strip of facts."""
    tower = soft_layers(loaded.model.visual)
    num_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    facts = [("Parameters", count_in_words(num_parameters))]
    if tower:
        e, s = tower[0].slots
        facts.append(
            ("Soft MoE layers", f"{len(tower)} {TIMES} {e} experts" + (f" {TIMES} {s} slots" if s > 1 else ""))
        )
    if record.steps:
        facts.append(("Steps", f"{record.steps[-1]['step']:,}"))
        if "samples_seen" in record.steps[-1]:
            facts.append(("Pairs seen", f"{record.steps[-1]['samples_seen']:,}"))
        if seconds := training_seconds(record.steps):
            facts.append(("Training time", duration(seconds)))
    return {
        "title": record.name,
        "date": datetime.now(UTC).strftime("%-d %B %Y"),
        "lead": lead(tower, numbers, len(sparse_layers(loaded.model.visual))),
        "facts": facts,
        "config": record.config,
        "config_short": record.config.count("\n") < 40,
        "model_config": model_config(run),
    }


def lead(tower: list, numbers: Numbers, num_sparse: int = 0) -> str:
    """Say in two sentences what the model is and what it can do."""
    layers = f"{len(tower)} Soft MoE layer{'s' * (len(tower) > 1)}"
    what = f"Two towers, one for pictures and one for text; the image tower holds {layers}." if tower else ""
    if num_sparse:
        what = (
            f"Two towers, one for pictures and one for text; the image tower holds {num_sparse} sparse MoE "
            f"layer{'s' * (num_sparse > 1)}, whose experts take whole patches: there are no slots to draw maps of."
        )
    what = what or "Two towers, one for pictures and one for text."
    name = next((name for name in numbers.metrics if name.endswith("text_to_image/recall@1")), None)
    if name is None or not numbers.chance.get(name):
        return what
    value, chance = numbers.metrics[name], numbers.chance[name]
    return (
        f"{what} Asked in words for one of {1 / chance:,.0f} pictures it has never seen, "
        f"it puts the right one first {percent(value)} of the time; guessing reaches {percent(chance)}."
    )


def numbers_of(numbers: Numbers) -> dict:
    """The cards on top, and the table of everything."""
    return {"headline": headline_figures(numbers), "figures": all_figures(numbers)}


def made(record: RunRecord, numbers: Numbers) -> list[tuple[str, str]]:
    """Versions, machine and evaluation settings, one per row."""
    rows = [
        (name, str(value)) for name, value in record.versions.items() if isinstance(value, (str, int)) and value != ""
    ]
    if not rows:
        rows = [(name, str(value)) for name, value in numbers.meta.get("versions", {}).items()]
    shown = {"model": "evaluated model", "date": "evaluated", "precision": "evaluated in", "ties": "ties"}
    rows += [(title, str(numbers.meta[name])) for name, title in shown.items() if numbers.meta.get(name)]
    for task, about in numbers.meta.get("tasks", {}).items():
        counts = [f"{value:,} {name.removeprefix('num_')}" for name, value in about.items() if name.startswith("num_")]
        counts += [f"{len(about['skipped'])} skipped"] if about.get("skipped") else []
        rows.append((task, ", ".join(counts)))
    return rows


def encoder_of(loaded):
    """An Encoder on the device the model is on; what is an Encoder already stays as it is."""
    from softmoe_clip.eval.encoder import Encoder

    if isinstance(loaded, Encoder):
        return loaded
    device = next(loaded.model.parameters()).device
    return Encoder(loaded.model, loaded.tokenizer, loaded.transform, device=device)


def routed_pictures(pool: Pool, shards: ShardSet) -> list:
    """Pictures for the router maps, spread over the pool."""
    places = np.linspace(0, len(pool.samples) - 1, min(NUM_ROUTED_PICTURES, len(pool.samples)))
    return [read_picture(shards, pool.samples[round(place)]) for place in places]


def soft_layers(tower) -> list:
    """The Soft MoE layers of a tower."""
    from softmoe_clip.moe.soft import SoftMoE

    return [module for module in tower.modules() if isinstance(module, SoftMoE)]


def sparse_layers(tower) -> list:
    """The sparse MoE layers of a tower."""
    from softmoe_clip.moe.sparse import SparseMoE

    return [module for module in tower.modules() if isinstance(module, SparseMoE)]


def model_config(run) -> str:
    """The text of open_clip_config.json of a run or model folder; empty where there is none."""
    places = [Path(run) / "model", Path(run)] if run else []
    files = [place / "open_clip_config.json" for place in places]
    return next((file.read_text(encoding="utf-8") for file in files if file.exists()), "")


def setting(config: str, name: str):
    """One top-level setting of a config's text; None where it is not set."""
    from omegaconf import OmegaConf

    tree = OmegaConf.create(config) if config.strip() else {}
    return tree.get(name)


def training_seconds(steps: list[dict]) -> float:
    """Time spent training, from the samples between log lines and their rate."""
    seconds, before = 0.0, 0
    for line in steps:
        if line.get("pairs_per_second") and "samples_seen" in line:
            seconds += (line["samples_seen"] - before) / line["pairs_per_second"]
            before = line["samples_seen"]
    return seconds


def duration(seconds: float) -> str:
    """Seconds in words."""
    hours, minutes = int(seconds // 3600), seconds / 60
    return (
        f"{hours} h {int(minutes) % 60:02d} min"
        if hours
        else f"{minutes:.1f} min"
        if minutes >= 1
        else f"{seconds:.0f} s"
    )


def count_in_words(number: int) -> str:
    """12_345_678 as 12.3 million."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,}"


def out_file(out, run) -> Path:
    """Where the page goes: a named .html file, or report.html in a folder."""
    if out is None and run is None:
        raise ValueError("the report needs a place: name an output file")
    out = Path(out if out is not None else run)
    return out if out.suffix in (".html", ".htm") else out / "report.html"
