"""Results: saved whole or not at all, shown with chance beside each number."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from softmoe_clip.eval.results import (
    Results,
    comparison,
    distinct_names,
    load_results,
    print_comparison,
    print_results,
    table,
    times_chance,
)

RESULTS = Results(
    metrics={"retrieval/x/text_to_image/recall@1": 0.25, "retrieval/x/text_to_image/median_rank": 4.0},
    chance={"retrieval/x/text_to_image/recall@1": 0.01, "retrieval/x/text_to_image/median_rank": 50.5},
    meta={"model": "Modell ü"},
    details={"zero_shot/x": {"per_class": []}},
)


def lines(rows):
    console = Console(width=150)
    with console.capture() as shown:
        console.print(rows)
    return [[cell.strip() for cell in line.split("│")] for line in shown.get().splitlines()]


def test_results_survive_a_round_trip(tmp_path):
    path = tmp_path / "deep" / "r.json"
    RESULTS.save(path)
    assert load_results(path) == RESULTS
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "r.json"
    RESULTS.save(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        Results({"a": float("nan")}, {}).save(path)
    assert load_results(path) == RESULTS
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"metrics": {}}', '{"metrics": 3, "chance": 3, "meta": 3, "details": 3}'])
def test_another_file_is_no_result_file(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r\.json is not a result file"):
        load_results(tmp_path / "r.json")


@pytest.mark.parametrize(("name", "why"), [("nofile.json", "No such file"), (".", "Is a directory")])
def test_a_result_file_that_cannot_be_read_is_one_sentence(tmp_path, name, why):
    with pytest.raises(ValueError, match=rf"^cannot read the result file .* \({why}.*\): write one with"):
        load_results(tmp_path / name)


@pytest.mark.parametrize("value", ["null", '"0.5"', "NaN", "true", "[]"])
@pytest.mark.parametrize("kind", ["metrics", "chance"])
def test_a_metric_that_is_no_number_is_named_with_its_file(tmp_path, kind, value):
    parts = {"metrics": "{}", "chance": "{}", "meta": "{}", "details": "{}"} | {kind: f'{{"x/top1": {value}}}'}
    (tmp_path / "r.json").write_text("{" + ", ".join(f'"{name}": {part}' for name, part in parts.items()) + "}")
    with pytest.raises(ValueError, match=rf"r\.json: x/top1 in its {kind} must be a number, got "):
        load_results(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["soft.json", "runs/dense.json"], ["soft", "dense"]),
        (["a/r.json", "b/r.json", "b/s.json"], ["a/r", "b/r", "s"]),
        (["a/eval/r.json", "b/eval/r.json"], ["a/eval/r", "b/eval/r"]),
        (["/r.json", "/r/r.json"], ["/r", "r/r"]),
        (["r.json", "r.json"], ["r", "r"]),
    ],
)
def test_files_are_named_so_that_they_can_be_told_apart(paths, names):
    assert distinct_names([Path(path) for path in paths]) == names


def test_the_table_shows_chance_beside_each_number():
    shown = lines(table(RESULTS))
    assert ["", "retrieval/x/text_to_image/recall@1", "25.00 %", "1.00 %", "25.0", ""] in shown
    assert ["", "retrieval/x/text_to_image/median_rank", "4.0", "50.5", "12.6", ""] in shown


def test_times_chance_has_no_value_where_it_has_no_meaning():
    assert times_chance("recall@1", 0.0, 0.1) is None
    assert times_chance("recall@1", 0.5, None) is None


def test_models_are_compared_side_by_side():
    other = Results(metrics={"retrieval/x/text_to_image/recall@1": 0.5, "zero_shot/y/top1": 0.1}, chance={})
    shown = lines(comparison([RESULTS, other], ["soft", "dense"]))
    assert ["", "retrieval/x/text_to_image/recall@1", "25.00 %", "50.00 %", "1.00 %", ""] in shown
    assert ["", "zero_shot/y/top1", "", "10.00 %", "", ""] in shown


@pytest.mark.parametrize("name", ["a b[x]", "x[/y]", "[red]", ":red_circle:", "end\\"])
def test_a_name_is_printed_as_it_is(name):
    results = Results({name: 0.5}, {name: 0.1})
    assert ["", name, "50.00 %", "10.00 %", "5.0", ""] in lines(table(results))
    shown = lines(comparison([results, results], [name, name]))
    assert name in "".join(shown[1])
    assert ["", name, "50.00 %", "50.00 %", "10.00 %", ""] in shown


def test_printing_into_a_pipe_cuts_no_name(capsys):
    long = "zero_shot/" + "x" * 90 + "/top1"
    print_results(Results({long: 0.5}, {long: 0.1}))
    assert long in capsys.readouterr().out


def measured(num_pictures, *skipped):
    task = {"num_pictures": num_pictures, "num_classes": 3, "skipped": list(skipped), "data": "x"}
    return Results({"zero_shot/x/top1": 0.5}, {}, {"tasks": {"zero_shot/x": task}})


def test_pictures_that_could_not_be_read_are_told_of(capsys):
    print_results(measured(3, {"key": "k\x1b", "shard": "0.tar", "reason": "no picture"}))
    told = "zero_shot/x: 1 of 4 pictures could not be read (first: k? in 0.tar: no picture)"
    assert capsys.readouterr().out.splitlines()[-1] == told


def test_a_comparison_says_what_was_not_measured_on_the_same(capsys):
    print_comparison([measured(3), measured(3), RESULTS], ["a", "b", "c"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("└")
    print_comparison([measured(3), RESULTS, measured(4)], ["a", "b", "c"])
    told = "zero_shot/x was not measured on the same: num_pictures is 3 in a, 4 in c"
    assert capsys.readouterr().out.splitlines()[-1] == told


def test_the_file_is_plain_json(tmp_path):
    RESULTS.save(tmp_path / "r.json")
    assert set(json.loads((tmp_path / "r.json").read_text())) == {"metrics", "chance", "meta", "details"}
