"""One page about a shard set, from what `data_pipelines.stats` counted, and a PNG of each chart beside it."""

from datetime import UTC, datetime
from pathlib import Path

from softmoe_clip.data_pipelines.new_folder import new_folder
from softmoe_clip.data_pipelines.stats import Stats, spread, spreads
from softmoe_clip.report.data_charts import WORDS, Chart, all_charts, drawn_png, drawn_svg, percent

PAGE = "stats.html"
NUM_WORDS = 60


def write_stats(stats: Stats, title: str, out: str | Path) -> Path:
    """Write OUT/stats.html and OUT/*.png; return the page. Raises ValueError where OUT is not empty."""
    charts = all_charts(stats)
    with new_folder(out) as folder:
        for chart in charts:
            (folder / f"{chart.name}.png").write_bytes(drawn_png(chart))
        (folder / PAGE).write_text(page(stats, title, charts), encoding="utf-8")
    return Path(out) / PAGE


def page(stats: Stats, title: str, charts: list[Chart]) -> str:
    """Fill the page; all text is escaped, the charts are SVG that `plots` escapes itself."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    shown = [{**chart._asdict(), "svg": Markup(drawn_svg(chart))} for chart in charts if chart.name != WORDS]
    words = stats.captions_with_word.most_common(NUM_WORDS)
    top = words[0][1] if words else 1
    return environment.get_template("stats.html.j2").render(
        title=title,
        date=datetime.now(UTC).strftime("%-d %B %Y"),
        lead=lead(stats),
        facts=facts(stats),
        captions=[chart for chart in shown if chart["name"] in ("words", "tokens", "captions")],
        pictures=[chart for chart in shown if chart["name"] in ("sizes", "shorter_side", "ratios")],
        words=[(word, 100 * number / top, percent(number / stats.num_captions)) for word, number in words],
        num_words=len(stats.captions_with_word),
        num_once=sum(number == 1 for number in stats.captions_with_word.values()),
        rows=[(name, *map(number_text, s)) for name, s in spreads(stats)],
    )


def facts(stats: Stats) -> list[tuple[str, str]]:
    """The strip of numbers on top."""
    formats = ", ".join(kind for kind, _ in stats.formats.most_common(3)) or "none"
    rows = [
        ("Pictures", f"{stats.sizes.total():,}"),
        ("Captions", f"{stats.num_captions:,}"),
        ("Different words", f"{len(stats.captions_with_word):,}"),
        ("Shards", f"{stats.num_shards:,}"),
        ("Size", size_text(stats.num_bytes)),
        ("Formats", formats),
    ]
    return rows + ([("Not readable", f"{stats.num_bad:,}")] if stats.num_bad else [])


def lead(stats: Stats) -> str:
    """Say in a sentence or two what the set is."""
    pictures, captions = stats.sizes.total(), stats.num_captions
    text = f"{pictures:,} pictures with {captions:,} captions"
    if captions:
        text += f", {spread(stats.words_per_caption).median:g} words long at the median"
    bad = f" {stats.num_bad:,} samples can't be read: softmoe-clip check says why." if stats.num_bad else ""
    return f"{text}.{bad}"


def number_text(value: float) -> str:
    """1234.5 as 1,234, and 1.333 as 1.33."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def size_text(num_bytes: int) -> str:
    """12_345_678 as 12.3 MB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"
