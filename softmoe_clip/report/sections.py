"""The sections of the report, each as the plain values that the page template shows."""

import math
from collections.abc import Sequence

import numpy as np

from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.report.examples import Example, Pool, image_to_text, text_to_image
from softmoe_clip.report.numbers import TIMES, in_words, percent
from softmoe_clip.report.overlays import EXPERT_COLOURS, leader_overlay, leaders, model_view, overlay, times_even
from softmoe_clip.report.pictures import data_uri, read_picture, thumbnail_uri
from softmoe_clip.report.plots import SECOND, Curve, line_chart
from softmoe_clip.report.router_maps import LayerMaps, layer_title, router_maps, telling_slots
from softmoe_clip.report.run_record import Numbers, RunRecord

MAX_LAYERS = 6
NUM_SLOTS = 5  # of a layer, with a map each
MAP_SIDE = 208  # pixels
MAX_CLASSES_SHOWN = 24
SMALL = (280, 172)
# Metrics worth a chart of their own, when training measured them several times.
TOLD_OVER_STEPS = ("/top1", "/recall@1", "/recall@10", "/accuracy")


def training_section(record: RunRecord, numbers: Numbers, loss: str | None) -> dict | None:
    """The loss curve, and small charts of the learning rate and whatever else was logged over steps."""
    if len(record.steps) < 2:
        return None
    steps, losses = series(record.steps, "loss")
    val_steps, val_losses = series(record.evaluations, "val/loss")
    batch = record.steps[-1].get("samples_seen", 0) / max(record.steps[-1]["step"], 1)
    # A model that says nothing has cross-entropy ln(batch); the sigmoid loss has no such level.
    chance = math.log(batch) if loss == "clip" and batch >= 2 else None
    curves = [Curve(steps, losses, smooth=True)]
    if val_steps:
        curves.append(Curve(val_steps, val_losses, SECOND, dots=len(val_steps) <= 40))
    alt = f"Training loss over {thousand(steps[-1])} steps, from {losses[0]:.2f} to {losses[-1]:.2f}"
    shapes = {"wide": (860, 330), "narrow": (360, 250)}
    return {
        "loss_wide": line_chart(curves, "wide", alt, shapes["wide"], chance=chance),
        "loss_narrow": line_chart(curves, "narrow", alt, shapes["narrow"], chance=chance),
        "has_validation": bool(val_steps),
        "chance": None if chance is None else f"ln {batch:,.0f} = {chance:.2f}",
        "charts": small_charts(record, numbers),
        "note": training_note(record, losses, val_losses),
    }


def small_charts(record: RunRecord, numbers: Numbers) -> list[dict]:
    """One small chart per logged quantity, and per telling metric that was measured more than once."""
    charts = []
    for name, title, about in (
        ("lr", "Learning rate", lambda values: f"peak {max(values):.2g}"),
        ("logit_scale", "Logit scale", lambda values: f"ends at {values[-1]:.1f}"),
        ("pairs_per_second", "Pairs per second", lambda values: f"median {np.median(values):,.0f}"),
    ):
        steps, values = series(record.steps, name)
        if len(values) > 1:
            curve = Curve(steps, values, smooth=name == "pairs_per_second")
            svg = line_chart([curve], f"log-{name}", f"{title} over steps", SMALL, floor=0)
            charts.append({"title": title, "about": about(values), "svg": svg})
    for place, name in enumerate(sorted({name for line in record.evaluations for name in line})):
        steps, values = series(record.evaluations, name)
        if len(values) < 2 or not (name.startswith("eval/") and name.endswith(TOLD_OVER_STEPS)):
            continue
        metric = name.removeprefix("eval/")
        (title, task), chance = in_words(metric), numbers.chance.get(metric)
        curve = Curve(steps, values, SECOND, dots=len(values) <= 40)
        svg = line_chart([curve], f"eval-{place}", f"{title} over steps", SMALL, unit="%", chance=chance)
        about = f"{task}, ends at {percent(values[-1])}" + (f", chance {percent(chance)}" if chance else "")
        charts.append({"title": title, "about": about, "svg": svg})
    return charts


def training_note(record: RunRecord, losses: Sequence[float], val_losses: Sequence[float]) -> str:
    """One sentence on how far training came."""
    seen = record.steps[-1].get("samples_seen")
    tail = losses[-max(1, len(losses) // 25) :]
    note = f"{thousand(record.steps[-1]['step'])} steps" + (f", {thousand(seen)} pairs seen. " if seen else ". ")
    note += f"The loss went from {losses[0]:.2f} to {np.mean(tail):.2f}"
    return note + (f"; on validation pairs it ends at {val_losses[-1]:.2f}." if val_losses else ".")


def series(lines: Sequence[dict], name: str) -> tuple[list[float], list[float]]:
    """The steps and values of one quantity, where it was logged and finite."""
    points = [(float(line["step"]), float(line[name])) for line in lines if isinstance(line.get(name), (int, float))]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def search_section(pool: Pool, shards: ShardSet) -> list[tuple[str, list[dict]]]:
    """Text to picture: the five nearest pictures of some captions, right ones first."""
    groups = {"Found first": [], "Not found first": []}
    for example in text_to_image(pool):
        shots = []
        for found in example.found:
            shot = picture_of(pool, shards, found.row, "The right picture" if found.right else "Another picture")
            shots.append({**shot, "right": found.right, "note": f"{'✓ ' if found.right else ''}{found.score:.2f}"})
        missed = None
        if not any(found.right for found in example.found):
            missed = picture_of(pool, shards, example.right_row, "The right picture")
            missed["note"] = f"the right one, at rank {example.rank:,}"
        group = "Found first" if example.rank == 1 else "Not found first"
        groups[group].append({"query": pool.caption(example.query), "shots": shots, "missed": missed})
    return [(name, examples) for name, examples in groups.items() if examples]


def picture_of(pool: Pool, shards: ShardSet, row: int, what: str) -> dict:
    """The data URI of a picture of the pool, and an alternative text from its own first caption."""
    uri = thumbnail_uri(read_picture(shards, pool.samples[row]))
    return {"uri": uri, "alt": f"{what}: {pool.captions[row][0]}"}


def captions_section(pool: Pool, shards: ShardSet) -> list[tuple[str, list[dict]]]:
    """Picture to text: the five nearest captions of some pictures, right ones first."""
    groups = {"A caption of its own comes first": [], "A caption of another picture comes first": []}
    for example in image_to_text(pool):
        name = list(groups)[example.rank > 1]
        shot = picture_of(pool, shards, example.query, "Picture asked about")
        groups[name].append({**shot, "lines": caption_lines(pool, example)})
    return [(name, examples) for name, examples in groups.items() if examples]


def caption_lines(pool: Pool, example: Example) -> list[dict]:
    """The best captions, and the best own one where it is not among them."""
    lines = [
        {
            "kind": "right" if f.right else "other",
            "note": f"{f.score:.2f}{' ✓' if f.right else ''}",
            "text": pool.caption(f.row),
        }
        for f in example.found
    ]
    if not any(found.right for found in example.found):
        own = f"{pool.caption(example.right_row)} (its own best, at rank {example.rank:,})"
        lines.append({"kind": "truth", "note": "…", "text": own})
    return lines


def classes_section(numbers: Numbers) -> list[dict]:
    """Zero-shot accuracy per class, best first; of many classes the best and the worst, the rest folded away."""
    tasks = []
    for name, details in sorted(numbers.details.items()):
        classes = [c for c in details.get("per_class", ()) if c.get("num_pictures")]
        if not classes:
            continue
        classes = sorted(classes, key=lambda c: -c["top1"])
        rows = [{"name": c["name"], "bar": 100 * c["top1"], "value": f"{100 * c['top1']:.0f} %"} for c in classes]
        half = MAX_CLASSES_SHOWN // 2 if len(rows) > MAX_CLASSES_SHOWN + 6 else len(rows)
        rest = rows[half : len(rows) - half] if half < len(rows) else []
        many = f"The {half} best and the {half} worst of {len(rows)} classes. " if rest else ""
        tasks.append(
            {
                "title": f"{in_words(f'{name}/top1')[0]} · {name.partition('/')[2]}",
                "note": f"{many}Share of the pictures of a class that get its name; the tick is guessing.",
                "shown": rows[:half] + (rows[len(rows) - half :] if rest else []),
                "rest": rest,
                "tick": 100 * numbers.chance.get(f"{name}/top1", 1 / len(details["per_class"])),
            }
        )
    return tasks


def routing_section(loaded, pictures: Sequence) -> list[dict]:
    """For each Soft MoE layer: what some slots take in of each picture, and which experts lead where."""
    layers = router_maps(loaded.model, pictures, loaded.transform) if pictures else []
    views = [model_view(picture, loaded.transform, MAP_SIDE) for picture in pictures]
    return [routing_layer(maps, views) for maps in spread(layers, MAX_LAYERS)]


def routing_layer(maps: LayerMaps, views: Sequence) -> dict:
    """One layer: a row of maps per picture, the leading experts and every expert's share."""
    _, e, s = maps.dispatch.shape[:3]
    slots, (leader, named) = telling_slots(maps, NUM_SLOTS), leaders(maps)
    cells = []
    for row, view in enumerate(views):
        cells.append({"uri": data_uri(view, 76), "alt": f"Picture {row + 1} as the model sees it", "mark": ""})
        for expert, slot in slots:
            weights = maps.dispatch[row, expert, slot]
            alt = f"Dispatch weights of expert {expert}, slot {slot}, over picture {row + 1}"
            cells.append(
                {"uri": data_uri(overlay(view, weights), 76), "alt": alt, "mark": f"{times_even(weights):.1f}{TIMES}"}
            )
        alt = f"Picture {row + 1}, each patch in the colour of its leading expert"
        cells.append({"uri": data_uri(leader_overlay(view, leader[row], named), 76), "alt": alt, "mark": ""})
    shares = np.sort(maps.combine.mean((0, 2, 3)))[::-1]
    shares = shares / shares.sum()
    led = [float((leader == expert).mean()) for expert in named]
    chips = [
        {"colour": c, "text": f"expert {x} leads {100 * l:.0f} %"}
        for c, x, l in zip(EXPERT_COLOURS, named, led, strict=False)
    ]
    heads = ["picture", *(f"expert {x}" + (f", slot {slot}" if s > 1 else "") for x, slot in slots), "who leads"]
    top = f"{shares[0] * e:.1f}{TIMES}"
    return {
        "title": layer_title(maps.layer),
        "note": f"{e} experts with {s} slot{'s' * (s > 1)} each",
        "heads": heads,
        "cells": cells,
        "chips": chips,
        "shares": [100 * share / shares[0] / 1.02 for share in shares],
        "even": 100 / e / shares[0] / 1.02,
        "shares_note": f"What each expert writes of the output, greatest first ({top} the even share, which is dotted)",
        "shares_alt": f"Shares of {e} experts in the output; the least is {shares[-1] * e:.1f}{TIMES} the even share",
    }


def spread(items: list, count: int) -> list:
    """Take `count` items evenly from first to last."""
    if len(items) <= count:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def thousand(number: int | float) -> str:
    """12345 as 12,345."""
    return f"{number:,.0f}"
