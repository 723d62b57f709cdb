"""The report: one file, nothing loaded from elsewhere, numbers beside chance, the right pictures beside the words."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from colour_model import COLOURS, ColourModel, colour_encoder, picture, tokenizer, transform, write_colours
from open_clip import CustomTextCLIP

from softmoe_clip.config import MoEConfig
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.eval.results import Results
from softmoe_clip.moe.install import install
from softmoe_clip.report.examples import Pool, embed_pool, image_to_text, text_to_image
from softmoe_clip.report.html import write_report
from softmoe_clip.report.numbers import TIMES, all_figures, figure
from softmoe_clip.report.plots import Curve, line_chart, smoothed
from softmoe_clip.report.run_record import Numbers, read_run

COLOUR_MODEL = SimpleNamespace(model=ColourModel(), tokenizer=tokenizer, transform=transform, config=None)
RESULTS = Results(
    metrics={"retrieval/colours/text_to_image/recall@1": 0.412, "zero_shot/colours/top1": 0.1},
    chance={"retrieval/colours/text_to_image/recall@1": 0.002, "zero_shot/colours/top1": 0.2},
    meta={"model": "runs/a", "tasks": {"zero_shot/colours": {"num_pictures": 6, "num_classes": 5, "skipped": []}}},
    details={"zero_shot/colours": {"per_class": [{"name": "red & <b>round</b>", "top1": 0.5, "num_pictures": 2}]}},
)


class Page(HTMLParser):
    """What a browser would fetch, the ids, and how many tags are left open."""

    EMPTY = frozenset({"meta", "link", "img", "br", "use", "path", "rect"})

    def __init__(self, text):
        super().__init__()
        self.fetched, self.ids, self.open, self.images, self.tags = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.fetched += [values[name] for name in ("src", "srcset", "data", "poster", "action") if name in values]
        self.fetched += [values["href"]] if "href" in values else []
        self.ids += [values["id"]] if "id" in values else []
        self.images += [values] if tag == "img" else []
        self.open += [tag] if tag not in self.EMPTY else []

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def run_folder(place, lines=40):
    """A run as training leaves it, the last line cut off by a kill."""
    run = place / "my run"
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text("# softmoe-clip train x.yaml\nloss: clip\nbatch_size: 8\n")
    (run / "versions.json").write_text(json.dumps({"torch": "2.99.0", "threads": 2}))
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, lines + 1):
            loss = float("nan") if step == 7 else 2.0 / step
            seen = {"step": step, "samples_seen": 8 * step, "loss": loss, "lr": 0.001, "pairs_per_second": 4.0}
            file.write(json.dumps(seen) + "\n")
            if step % 20 == 0:
                name = "eval/retrieval/colours/text_to_image/recall@1"
                file.write(json.dumps({"step": step, "val/loss": 0.3, name: step / 100}) + "\n")
        file.write('{"step": 41, "lo')
    RESULTS.save(run / "eval/step.json")
    return run


def soft_moe_model(num_blocks=2):
    vision = {"image_size": 32, "width": 32, "layers": num_blocks, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    model = CustomTextCLIP(16, vision, text)
    install(model.visual, MoEConfig(num_experts=3))
    from softmoe_clip.data_pipelines.transforms import eval_transform

    transform = eval_transform({"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}, image_size=32)

    def ids(texts):
        return tokenizer(texts)[:, None].expand(-1, 8)

    return SimpleNamespace(model=model.eval(), tokenizer=ids, transform=transform, config={})


def test_a_whole_report_is_one_file_that_fetches_nothing(tmp_path):
    shards = write_colours(tmp_path / "shards", damaged=True)
    out = write_report(run_folder(tmp_path), soft_moe_model(), shards, RESULTS, tmp_path / "page")
    assert out == tmp_path / "page/report.html"
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.fetched)
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\((?![\"']?(data:|#))", text)
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.fetched if address.startswith("#")} <= set(page.ids)
    assert page.images
    assert all(image.get("alt") for image in page.images)
    assert out.stat().st_size < 6_000_000
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_the_page_tells_numbers_chance_config_versions_and_the_run(tmp_path):
    run = run_folder(tmp_path)
    shards = write_colours(tmp_path / "shards")
    text = write_report(run, soft_moe_model(), shards).read_text(encoding="utf-8")
    visible = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text.split("</style>")[1]))
    visible = visible.replace("\N{NO-BREAK SPACE}", " ").replace(TIMES, "x")
    for shown in ("my run", "41.2", "chance 0.20 %", "206x chance", "0.5x chance", "2.99.0", "40 steps", "Block 1"):
        assert shown in visible
    assert "# softmoe-clip train x.yaml loss: clip" in visible
    assert "ln 8 = 2.08" in visible
    assert "1.3 min" in visible  # 320 pairs at 4 a second
    assert "red &amp; &lt;b&gt;round&lt;/b&gt;" in text
    assert "<b>round" not in text


def test_a_model_without_run_results_or_shards_has_a_report_too(tmp_path):
    text = write_report(None, COLOUR_MODEL, None, {}, tmp_path / "a.html").read_text(encoding="utf-8")
    assert Page(text).open == []
    shards = write_colours(tmp_path / "shards")
    text = write_report(tmp_path, COLOUR_MODEL, shards, None, tmp_path / "b.html").read_text(encoding="utf-8")
    assert "Words to pictures" in text
    assert "What the slots look at" not in text
    with pytest.raises(ValueError, match="output file"):
        write_report(None, COLOUR_MODEL)


def test_a_deep_tower_shows_some_layers_and_says_so(tmp_path):
    shards = write_colours(tmp_path / "shards")
    text = write_report(None, soft_moe_model(num_blocks=16), shards, {}, tmp_path / "a.html").read_text(
        encoding="utf-8"
    )
    assert "Shown are 6 of 8 layers" in text
    assert [f"Block {i}<" in text for i in (8, 15)] == [True, True]


def test_captions_are_shown_as_text_never_as_markup(tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        writer.add(picture("red"), "png", ['<script>alert("1")</script> & <img src=http://x.y> red'])
        writer.add(picture("blue"), "png", ['blue " onerror="x'])
    text = write_report(None, COLOUR_MODEL, tmp_path / "shards", {}, tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert all(address.startswith(("data:", "#")) for address in page.fetched)
    assert not any("onerror" in image for image in page.images)


def test_examples_of_a_perfect_model_are_all_right_and_shown_with_their_own_picture(tmp_path):
    shards = ShardSet.open(write_colours(tmp_path / "shards", damaged=True))
    pool = embed_pool(colour_encoder(), shards)
    assert pool.samples == [0, 1, 3, 4, 5, 6]
    for example in text_to_image(pool, num_right=10):
        assert example.rank == 1
        assert example.found[0].right
        colour = list(COLOURS)[example.found[0].row]
        assert pool.caption(example.query) == f"a {colour} square"
    for example in image_to_text(pool, num_right=10):
        assert [found.right for found in example.found] == [True, True, False, False, False]
        assert {pool.picture_of_text[found.row] for found in example.found[:2]} == {example.query}


def test_a_model_that_says_nothing_is_never_shown_as_right():
    same = np.ones((6, 4), np.float32) / 2
    pool = Pool(list(range(6)), [("x",)] * 6, same, same, np.arange(6))
    examples = text_to_image(pool) + image_to_text(pool)
    assert examples
    assert all(example.rank == 6 and not example.found[0].right for example in examples)


def test_right_and_wrong_examples_are_told_apart_by_rank():
    images = np.eye(8, dtype=np.float32)
    texts = images.copy()
    texts[3] = images[4] * 0.8 + images[3] * 0.6
    pool = Pool(list(range(8)), [(f"caption {i}",) for i in range(8)], images, texts, np.arange(8))
    examples = text_to_image(pool, num_right=2)
    assert [example.rank for example in examples] == [1, 1, 2]
    assert examples[2].query == examples[2].right_row == 3
    assert [found.right for found in examples[2].found[:2]] == [False, True]


@pytest.mark.parametrize(
    ("name", "value", "chance", "shown"),
    [
        (
            "retrieval/a/b/text_to_image/recall@1",
            0.412,
            0.02,
            ("Text to picture, recall@1", "a/b", "41.2 %", "2.0 %", "21x"),
        ),
        ("zero_shot/s/mean_per_class", 0.004, 0.0125, ("Zero-shot, mean per class", "s", "0.40 %", "1.2 %", "0.3x")),
        ("retrieval/s/image_to_text/median_rank", 3.0, 250.5, ("Picture to text, median rank", "s", "3", "250.5", "")),
        ("relations/s/accuracy", 0.64, None, ("Relations, accuracy", "s", "64.0 %", "", "")),
        ("loss", 1.25, None, ("loss", "", "1.25", "", "")),
    ],
)
def test_metrics_are_put_into_words(name, value, chance, shown):
    told = figure(name, value, chance)
    plain = (told.title, told.task, told.value, told.chance, told.times)
    assert tuple(text.replace("\N{NO-BREAK SPACE}", " ").replace(TIMES, "x") for text in plain) == shown


def test_metrics_are_listed_with_their_numbers_in_order():
    names = ["r/10²/recall@1", "r/9/recall@5", "r/9/recall@10", "r/9/recall@1", "2d/top1"]
    numbers = Numbers(dict.fromkeys(names, 0.5), {}, {}, {})
    assert [figure.name for figure in all_figures(numbers)] == [names[place] for place in (4, 3, 1, 2, 0)]


def test_charts_take_their_colours_and_fonts_from_the_page():
    svg = line_chart([Curve([1, 2, 3], [3, 2, 1], smooth=True)], "loss", 'Loss "x" & more', (300, 200), chance=2.5)
    assert 'aria-label="Loss &quot;x&quot; &amp; more"' in svg
    assert "var(--accent)" in svg
    assert not re.search(r"#[0-9a-f]{6}|font-family|<metadata|<style", svg)
    assert re.findall(r'id="([^"]*)"', svg)
    assert all(name.startswith("loss-") for name in re.findall(r'(?:id="|href="#|url\(#)([^")]*)', svg))


def test_smoothing_keeps_constants_ends_and_mean():
    assert smoothed(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))
    line = np.arange(200.0)
    assert smoothed(line) == pytest.approx(line)
    assert len(smoothed(np.array([1.0]))) == 1


@pytest.mark.slow
def test_a_browser_shows_the_page_without_sideways_scrolling(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    out = write_report(run_folder(tmp_path), soft_moe_model(), write_colours(tmp_path / "shards"), RESULTS)
    probe = "<script>document.title = document.documentElement.scrollWidth + '/' + innerWidth</script></body>"
    page = tmp_path / "probe.html"
    page.write_text(out.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync"
    for width in (500, 820, 1400):
        command = [browser, *quiet.split(), f"--user-data-dir={tmp_path / str(width)}", f"--window-size={width},900"]
        dom = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
        scroll, inner = map(int, re.search(r"<title>(\d+)/(\d+)</title>", dom.stdout).groups())
        assert scroll <= inner <= width


def test_a_damaged_line_in_the_middle_of_a_log_hides_no_other(tmp_path):
    run = run_folder(tmp_path)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[9] = b'{"step": 10, "loss": 0.\xe9}\n'
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    assert [line["step"] for line in read_run(run).steps] == [step for step in range(1, 41) if step != 10]
