"""Strict configs: what fits is converted, what does not is one sentence that names the key and the right one."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from softmoe_clip.data_pipelines.strict import load_strict


@dataclass(frozen=True)
class Layers:
    router: Literal["soft", "sparse"] = "soft"
    num_experts: int = 32
    blocks: Literal["last_half"] | list[int] = "last_half"

    def __post_init__(self):
        if self.num_experts < 1:
            raise ValueError(f"at least one expert is needed, got {self.num_experts}")


@dataclass(frozen=True)
class Task:
    name: str
    data: str = "d"


@dataclass(frozen=True)
class Train:
    out: str
    steps: int = 10
    lr: float = 1e-3
    flip: bool = False
    crop: tuple[float, float] = (0.05, 1.0)
    betas: tuple[float, ...] = (0.9, 0.99)
    layers: Layers = field(default_factory=lambda: Layers(num_experts=8))
    maybe: Layers | None = None
    tasks: tuple[Task, ...] = ()
    note: str | list[str] = ""
    weights: dict[str, float] = field(default_factory=dict)
    rules: dict[str, float] = field(default_factory=lambda: {"bias": 0.0, ".*": 0.1})
    free: Any = None
    val: str | None = None


def load(given=None, *overrides):
    return load_strict(Train, {"out": "o", **(given or {})}, list(overrides))


def test_values_are_converted_to_the_declared_types():
    config = load(
        {
            "steps": 1e3,
            "lr": 1,
            "crop": [0.1, 1],
            "betas": [1, 0.5, 0.25],
            "maybe": {"blocks": [1, 2]},
            "tasks": [{"name": "a"}, {"name": "b", "data": "x"}],
            "weights": {"a": 1},
            "free": {"deep": [1, {"x": None}]},
        }
    )
    assert config == Train(
        out="o",
        steps=1000,
        lr=1.0,
        crop=(0.1, 1.0),
        betas=(1.0, 0.5, 0.25),
        maybe=Layers(blocks=[1, 2]),
        tasks=(Task("a"), Task("b", "x")),
        weights={"a": 1.0},
        free={"deep": [1, {"x": None}]},
    )
    assert type(config.steps) is int
    assert type(config.lr) is float
    assert type(config.crop) is tuple


def test_a_section_given_in_part_keeps_the_defaults_of_the_config_around_it():
    assert load({"layers": {"router": "sparse"}}).layers == Layers("sparse", num_experts=8)
    assert load(None, "maybe.num_experts=4").maybe == Layers(num_experts=4)
    assert load({"maybe": None}).maybe is None


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("out: a\nlr: 1e-4\ntasks: [{name: x}, {name: y}]\n")
    config = load_strict(Train, path, ["lr=3e-4", "tasks.1.data=new", "layers.blocks=[3,4]", "val=a=b", "flip=true"])
    assert config.lr == 3e-4
    assert config.tasks == (Task("x"), Task("y", "new"))
    assert config.layers == Layers(num_experts=8, blocks=[3, 4])
    assert config.val == "a=b"
    assert config.flip is True


def test_single_keys_of_a_mapping_that_was_given_can_be_set():
    assert load({"rules": {"norm": 1, "bias": 2}}, "rules.norm=3").rules == {"norm": 3.0, "bias": 2.0}
    assert load({}, "rules={norm: 1}", "rules.bias=2").rules == {"norm": 1.0, "bias": 2.0}
    assert load({}, "weights.a=2").weights == {"a": 2.0}


def test_a_home_folder_is_filled_in(monkeypatch):
    """No shell does it in `out=~/runs/a`."""
    monkeypatch.setenv("HOME", "/somebody")
    found = load({"out": "~/a"}, "note=[~/b, a~/c, '~d/e']")
    assert (found.out, found.note) == ("/somebody/a", ["/somebody/b", "a~/c", "~d/e"])


def test_environment_variables_and_other_keys_can_be_used(monkeypatch):
    monkeypatch.setenv("SOFTMOE_TEST_FOLDER", "/x")
    assert load({"val": "${oc.env:SOFTMOE_TEST_FOLDER}/val", "note": "${out}"}).val == "/x/val"
    monkeypatch.delenv("SOFTMOE_TEST_FOLDER")
    with pytest.raises(ValueError, match=r"^val in the config: Environment variable 'SOFTMOE_TEST_FOLDER' not found$"):
        load({"val": "${oc.env:SOFTMOE_TEST_FOLDER}/val"})


@pytest.mark.parametrize(
    ("given", "overrides", "message"),
    [
        ({"stps": 3}, [], "unknown key stps in the config: did you mean steps?"),
        (
            {"layers": {"num_expert": 3}},
            [],
            "unknown key layers.num_expert in the config: did you mean layers.num_experts?",
        ),
        ({"maybe": {"ruoter": "soft"}}, [], "unknown key maybe.ruoter in the config: did you mean maybe.router?"),
        (
            {"tasks": [{"name": "a"}, {"nmae": "b"}]},
            [],
            "unknown key tasks.1.nmae in the config: did you mean tasks.1.name?",
        ),
        ({"num_experts": 3}, [], "unknown key num_experts in the config: did you mean layers.num_experts?"),
        (
            {"maybe": {"zzz": 3}},
            [],
            "unknown key maybe.zzz in the config: the keys there are router, num_experts, blocks",
        ),
        ({}, ["layers.roter=soft"], "unknown key layers.roter in the overrides: did you mean layers.router?"),
        ({"tasks": [{"data": "b"}]}, [], "tasks.0.name is missing in the config: it has no default"),
        ({"steps": "ten"}, [], "steps in the config must be a whole number, got 'ten' (str)"),
        ({"steps": 1.5}, [], "steps in the config must be a whole number, got 1.5 (float)"),
        ({"steps": True}, [], "steps in the config must be a whole number, got True (bool)"),
        ({"steps": float("inf")}, [], "steps in the config must be a whole number, got inf (float)"),
        ({"steps": None}, [], "steps in the config must be a whole number, got None (NoneType)"),
        ({}, ["lr=fast"], "lr in the overrides must be a number, got 'fast' (str)"),
        ({"flip": "yes please"}, [], "flip in the config must be true or false, got 'yes please' (str)"),
        ({"out": 3}, [], "out in the config must be a string, got 3 (int): write it in quotes"),
        ({"crop": [1]}, [], "crop in the config must be a list of 2 values (a number, a number), got [1] (list)"),
        ({"betas": [0.9, "x"]}, [], "betas.1 in the config must be a number, got 'x' (str)"),
        (
            {"layers": {"router": "hard"}},
            [],
            "layers.router in the config must be one of soft, sparse, got 'hard' (str)",
        ),
        (
            {"layers": {"blocks": "first_half"}},
            [],
            "layers.blocks in the config must be last_half or a list (each item a whole number), got 'first_half'",
        ),
        (
            {"layers": 3},
            [],
            "layers in the config must be a section with the keys router, num_experts, blocks, got 3 (int)",
        ),
        (
            {"layers": None},
            [],
            "layers in the config must be a section with the keys router, num_experts, blocks, got None",
        ),
        ({"layers": {"num_experts": 0}}, [], "layers in the config: at least one expert is needed, got 0"),
        ({"weights": {"a": "b"}}, [], "weights.a in the config must be a number, got 'b' (str)"),
        ({"val": "${nowhere}"}, [], "val in the config: Interpolation key 'nowhere' not found"),
        ({}, ["steps"], "override 'steps' must look like a.b=value"),
        ({}, ["=3"], "override '=3' must look like a.b=value"),
        ({}, ["a..b=3"], "override 'a..b=3' must look like a.b=value"),
        ({}, ["betas=[1"], "override 'betas=[1' is not valid YAML ("),
        ({}, ["weights={^a[.]: 1}"], "override 'weights={^a[.]: 1}' is not valid YAML ("),
        (
            {},
            ["rules.norm=1"],
            "rules in the overrides would lose the keys of its default (bias, .*): give all that it",
        ),
        ({}, ["out=set #2"], "override 'out=set #2': YAML drops what stands after ' #', put the value in quotes"),
        ({}, ["out.deeper=1"], "out in the overrides must be a string, got {'deeper': 1} (dict)"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(given, overrides, message):
    with pytest.raises(ValueError, match=r"^.*$") as caught:
        load(given, *overrides)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_hash_in_quotes_or_in_a_word_is_a_letter_like_any_other():
    assert [load(None, override).out for override in ("out='set #2'", "out=set#2")] == ["set #2", "set#2"]


def test_a_required_key_is_asked_for():
    with pytest.raises(ValueError, match=r"^out is missing in the config: it has no default$"):
        load_strict(Train, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"out: [1\nsteps: 3\n", "line 2 is not valid YAML: "),
        (b"out: a\nout: b\n", "is not valid YAML: found duplicate key out"),
        (b"- a\n- b\n", "must hold `key: value` lines at its top level"),
        (b"hello\n", "must hold `key: value` lines at its top level"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"null: 2\n", "has the key null: write it in quotes, as text, or remove it"),
        (b"optim: {~: 2}\n", "has the key null in optim: write it in quotes"),
        (b"out: ${\n", "out in "),
        (b"", "out is missing in "),
    ],
)
def test_a_broken_file_is_one_sentence_that_names_it(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"broken\.yaml") as caught:
        load_strict(Train, str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_sentence_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"^cannot read the config .*nothing\.yaml: No such file or directory$"):
        load_strict(Train, tmp_path / "nothing.yaml")
    with pytest.raises(ValueError, match=r"^cannot read the config .*: Is a directory$"):
        load_strict(Train, tmp_path)


def test_reading_a_config_does_not_import_torch():
    code = (
        "import sys, dataclasses, softmoe_clip.data_pipelines.strict as strict\n"
        "strict.load_strict(dataclasses.make_dataclass('C', [('a', int)]), {'a': 1}, ['a=2'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
