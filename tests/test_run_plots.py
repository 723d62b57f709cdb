"""Several runs in one picture: the right numbers at the right places, every curve named, mistakes in one sentence."""

import json

import numpy as np
import pytest
from PIL import Image

from softmoe_clip.report.run_plots import COLOURS, LINE, apart, figure_of, shortened, window_mean
from softmoe_clip.report.run_series import choose, read_runs, short_names
from softmoe_clip.training.loop import train


def write_run(folder, num_steps=60, rate=100.0, seconds=True, **more):
    """A run folder with a falling loss, a measurement half way and at the end, and two layers' routing."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, num_steps + 1):
        line = {"step": step, "samples_seen": 8 * step, "loss": 4 / step**0.5, "lr": 0.001, "gradient_norm": 2.0}
        line |= {"pairs_per_second": rate} | ({"seconds": 8 * step / rate} if seconds else {})
        line |= {"routing/image/block_1/dispatch_entropy": 0.5, "routing/image/block_2/dispatch_entropy": 0.9, **more}
        lines.append(json.dumps(line))
        if step in (num_steps // 2, num_steps):
            recall = {"eval/retrieval/scenes/text_to_image/recall@1": 0.1 + step / 1000}
            lines.append(json.dumps({"step": step, "val/loss": 2.0, **recall}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two runs of different length and speed; the second logged no seconds, as older runs did not."""
    return [
        write_run(tmp_path / "a/run"),
        write_run(tmp_path / "b/run", num_steps=30, rate=50.0, seconds=False),
    ]


def drawn(figure, title):
    """The axes with a title, its bold curves by colour, and the names in their order from below."""
    [axes] = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    bold = {line.get_color(): line.get_xydata() for line in axes.lines if line.get_linewidth() == 1.9}
    names = sorted((text.get_position()[1], text.get_text()) for text in axes.texts)
    return axes, bold, [name for _, name in names]


def test_every_usual_metric_has_a_chart_and_every_curve_its_name(runs):
    series = read_runs(runs, "step")
    figure = figure_of(series, choose(series, ()), "step")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Training loss",
        "Loss on held-out pairs",
        "Text to picture, recall@1 (scenes)",
        "Learning rate",
        "Gradient norm",
        "Dispatch entropy, 1 is uniform",
    ]
    _, bold, names = drawn(figure, "Text to picture, recall@1 (scenes)")
    np.testing.assert_allclose(bold[COLOURS[0]], [[30, 13], [60, 16]])
    np.testing.assert_allclose(bold[COLOURS[1]], [[15, 11.5], [30, 13]])
    assert names == ["b", "a"]
    axes, bold, _ = drawn(figure, "Dispatch entropy, 1 is uniform")
    np.testing.assert_allclose(bold[COLOURS[0]][:, 1], 0.7)
    assert axes.get_xlim()[1] >= 60


@pytest.mark.parametrize(("x", "unit"), [("samples_seen", 8), ("minutes", 8 / 100 / 60)])
def test_pairs_and_minutes_come_from_the_log_also_for_what_is_measured_in_between(runs, x, unit):
    fast, slow = read_runs(runs, x)
    np.testing.assert_allclose(fast.curves["loss"][0], unit * np.arange(1, 61))
    np.testing.assert_allclose(fast.curves["val/loss"][0], unit * np.array([30, 60]))
    twice = 2 if x == "minutes" else 1  # at half the rate, from samples and rates alone
    np.testing.assert_allclose(slow.curves["loss"][0], twice * unit * np.arange(1, 31))
    np.testing.assert_allclose(slow.curves["val/loss"][0], twice * unit * np.array([15, 30]))


def test_the_verb_writes_a_picture_of_real_runs(tiny_config, softmoe_clip, tmp_path):
    for name in ("one", "two"):
        train(tiny_config("steps=2", f"out={tmp_path}/{name}", f"seed={len(name)}"))
    done = softmoe_clip("plot", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "new/all.png", "--x", "minutes")
    assert done.returncode == 0, done
    assert done.stdout.strip() == str(tmp_path / "new/all.png")
    with Image.open(tmp_path / "new/all.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["all.png"]
    asked = ["--metric", "gradient_norm/*", "--metric", "logit_scale", "--out", tmp_path / "some.svg"]
    assert softmoe_clip("plot", tmp_path / "one", *asked).returncode == 0
    told = (tmp_path / "some.svg").read_text()
    assert all(f">{name}<" in told for name in ("gradient_norm/visual", "gradient_norm/text", "logit_scale"))


MISTAKES = {
    "no such folder": (["nowhere"], "nowhere holds no run: there is no metrics.jsonl"),
    "the folder above": (["a"], "a holds no run: there is no metrics.jsonl; did you mean a/run?"),
    "nothing logged": (["empty"], "empty/metrics.jsonl has no numbers yet"),
    "no such metric": (["a/run", "--metric", "val/los"], "no run has logged 'val/los': did you mean val/loss?"),
    "no such axis": (["a/run", "--x", "hours"], "x must be one of step, samples_seen, minutes, got 'hours'"),
    "no picture": (["a/run", "--out", "all.txt"], "must end in .png, .svg or .pdf, got all.txt"),
    "no time": (["bare", "--x", "minutes"], "bare does not say where its steps stand in minutes: give --x step"),
    "nothing usual": (["bare"], "none of the usual metrics is in bare: name some with --metric"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_no_picture(runs, softmoe_clip, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder, text in (("empty", ""), ("bare", '{"step": 1, "other": 2}\n')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metrics.jsonl").write_text(text)
    arguments, told = MISTAKES[name]
    done = softmoe_clip("plot", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "bare", "empty"]


def test_damaged_lines_are_left_out_and_counted(runs, tmp_path, capsys):
    file = runs[0] / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[5] = lines[5][:20]
    file.write_text("\n".join([*lines, '{"step": 61, "loss": NaN}', "[1, 2]", '{"step": null}', '{"step": 62, "lo']))
    [series] = read_runs([runs[0]], "step")
    assert f"{file}: 4 damaged line(s) left out" in capsys.readouterr().err
    assert len(series.curves["loss"][0]) == 59
    assert np.isfinite(series.curves["loss"][1]).all()


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/runs/a"], ["a"]),
        (["/runs/a", "/runs/b"], ["a", "b"]),
        (["/x/a/run", "/x/b/run"], ["a", "b"]),
        (["/x/a/1", "/y/a/2"], ["1", "2"]),
        (["/x/a/1", "/y/b/1", "/y/b/2"], ["a/1", "b/1", "b/2"]),
        (["/x/run", "/x/y/run"], ["x", "y"]),
    ],
)
def test_a_run_is_named_by_what_tells_it_from_the_others(folders, names):
    from pathlib import Path

    assert short_names([Path(folder) for folder in folders]) == names


def test_a_run_at_a_url_is_drawn_as_one_in_a_folder(runs, tmp_path):
    url = f"file://{tmp_path}/b/run"
    assert [series.name for series in read_runs([runs[0], url], "step")] == ["a", "b"]
    np.testing.assert_array_equal(
        read_runs([url], "minutes")[0].curves["loss"], read_runs([runs[1]], "minutes")[0].curves["loss"]
    )
    with pytest.raises(ValueError, match=f"^file://{tmp_path}/none holds no run: there is no metrics.jsonl$"):
        read_runs([f"file://{tmp_path}/none"], "step")
    with pytest.raises(ValueError, match=r"^nope://x cannot be read: "):
        read_runs(["nope://x"], "step")


def test_a_run_that_is_named_twice_is_drawn_once(runs):
    assert [run.name for run in read_runs([runs[0], runs[1], runs[0] / "../run"], "step")] == ["a", "b"]


def test_names_stand_apart_in_the_order_of_their_curves_and_move_no_more_than_needed():
    places = [0.0, 0.01, 0.5, 0.5, 0.5, 0.9, 0.99, 1.0]
    moved = apart(places, 0.1)
    assert (np.diff(moved) >= 0.1 - 1e-9).all()
    assert min(moved) >= 0
    assert max(moved) <= 1
    assert moved[2:5] == pytest.approx([0.4, 0.5, 0.6])
    assert apart([0.2, 0.8], 0.1) == pytest.approx([0.2, 0.8])


def test_twelve_runs_find_room_for_their_names(tmp_path):
    runs = [write_run(tmp_path / f"width_{number}", num_steps=3) for number in range(12)]
    series = read_runs(runs, "step")
    figure = figure_of(series, ["loss", "val/loss"], "step")
    for axes in figure.axes:
        places = sorted(text.get_position()[1] for text in axes.texts)
        height = axes.get_position().height * figure.get_figheight() * 72
        assert (np.diff(places) * height >= LINE - 1e-6).all()
        assert len(places) == 12


def test_the_mean_over_a_window_keeps_a_line_and_its_ends():
    flat = window_mean(np.full(100, 3.0))
    np.testing.assert_allclose(flat, 3)
    noisy = np.random.default_rng(0).normal(size=200)
    expected = [noisy[max(0, i - 4) : i + 5].mean() for i in range(200)]
    np.testing.assert_allclose(window_mean(noisy), expected)


def test_ticks_of_a_curve_that_hardly_moves_are_told_apart(tmp_path):
    series = read_runs([write_run(tmp_path / "run", num_steps=1)], "step")
    steps = np.arange(5.0)
    series[0].curves["scale"] = steps, 12 - steps * 3e-4
    [axes] = figure_of(series, ["scale"], "step").axes
    labels = [axes.yaxis.get_major_formatter()(y, 0) for y in axes.get_yticks()]
    assert len(set(labels)) == len(labels)


def test_runs_that_differ_by_a_rounding_look_alike_and_no_label_leaves_the_picture(tmp_path):
    runs = read_runs([write_run(tmp_path / name, num_steps=1) for name in ("a", "b")], "step")
    for number, run in enumerate(runs):
        for metric, value in (("loss", 2.4643655), ("norm", 0.95616015), ("rate", 0.0123456), ("zero", 0.0)):
            run.curves[metric] = np.array([3.0]), np.array([value * (1 + number * 1e-7)])
    figure = figure_of(runs, ["loss", "norm", "rate", "zero"], "step")
    figure.draw_without_rendering()
    for axes in figure.axes:
        ends = [line.get_ydata()[-1] for line in axes.lines if line.get_marker() == "o"]
        low, high = axes.get_ylim()
        assert abs(ends[1] - ends[0]) < 1e-3 * (high - low)
        for label in axes.get_yticklabels():
            assert label.get_window_extent().x0 >= 0, label


def test_a_long_name_keeps_both_its_ends():
    assert shortened("a_short_name") == "a_short_name"
    long = shortened("softmoe_vit_small_patch16_lr0.0003_seed1")
    assert len(long) <= 26
    assert long.startswith("softmoe_vit_")
    assert long.endswith("lr0.0003_seed1"[-12:])
