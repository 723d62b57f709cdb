"""Templates: sets by name, from a file, and from the config; class names go in as they are."""

import pytest

from softmoe_clip.eval.templates import TEMPLATES, fill, find_templates


def test_all_placeholders_are_filled():
    assert fill("a photo of a {}.", "red cat") == "a photo of a red cat."
    assert fill("{c}, {c}", "dog") == "dog, dog"
    assert fill("{a}, a type of {}: {c}", "owl") == "an owl, a type of owl: owl"
    assert [fill("this is {a}", name) for name in ("orange star", "red star")] == [
        "this is an orange star",
        "this is a red star",
    ]


def test_braces_in_a_class_name_stay():
    assert fill("a {}", "set {c} of {}") == "a set {c} of {}"
    assert fill("{c}, {}", "{a}") == "{a}, {a}"


def test_own_sets_have_distinct_prompts():
    for templates in TEMPLATES.values():
        assert len({fill(template, "owl") for template in templates}) == len(templates)


def test_the_prompts_of_openai_come_from_open_clip():
    prompts = {fill(template, "owl") for template in find_templates("openai")}
    assert len(prompts) == 80
    assert "itap of a owl." in prompts


def test_a_file_and_a_list_are_taken_as_they_are(tmp_path):
    (tmp_path / "t.txt").write_text("a {c}\n\nthe {c}\n", "utf-8-sig")
    assert find_templates(str(tmp_path / "t.txt")) == ["a {c}", "the {c}"]
    assert find_templates(["x {}"]) == ["x {}"]


@pytest.mark.parametrize(
    ("templates", "message"),
    [("simpel", "did you mean simple"), ("zzz", "there are plain"), (["no place"], "'no place'"), ([], "empty")],
)
def test_wrong_templates_are_named(templates, message):
    with pytest.raises(ValueError, match=message):
        find_templates(templates)
