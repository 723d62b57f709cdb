"""The repository keeps its own rules: what lies where, how long a module is, what no file may mention."""

import re

import pytest
from checkout import ROOT, checkout_files

TOP_LEVEL = {
    *("softmoe_clip", "configs", "data_pipelines", "eval", "tests", "pyproject.toml", "README.md"),
    *("Makefile", "LICENSE", "CITATION.cff", "requirements.lock", "requirements-dev.lock"),
    *("benchmarks", "docs", "notebooks", ".ci", ".gitignore"),
}
LINKS = ("softmoe_clip/configs", "softmoe_clip/data_pipelines", "softmoe_clip/eval")
# In pieces, so that this file itself does not mention them.
MACHINE_PATHS = r"(?<![\w.~/-])/(?:work|root|home|Users|opt)/" + r"\w"
ADDRESSES = "|".join(
    ["py" + r"pi\.org", "files.python" + "hosted", "download.py" + "torch", "index" + "-url", "find" + "-links"]
)


@pytest.fixture(scope="module")
def texts():
    """Every text file of the checkout, path to text."""
    texts = {}
    for path in checkout_files():
        if not (ROOT / path).is_symlink() and b"\0" not in (data := (ROOT / path).read_bytes()):
            texts[path.as_posix()] = data.decode()
    return texts


def test_the_top_level_holds_only_what_people_and_tools_expect():
    assert {path.parts[0] for path in checkout_files()} - TOP_LEVEL == set()


@pytest.mark.parametrize("link", LINKS)
def test_the_top_level_folders_are_linked_into_the_package_by_relative_links(link):
    assert (ROOT / link).readlink().as_posix() == f"../{link.split('/')[1]}"


def test_every_config_starts_with_the_command_that_runs_it(texts):
    configs = [name for name in texts if name.startswith("configs/") and name.endswith(".yaml")]
    assert configs
    for name in configs:
        assert re.match(r"# .*\b(softmoe-clip|make|accelerate launch) ", texts[name]), f"{name}: line 1 is no command"
        assert name in texts[name].splitlines()[0], f"{name}: the command of line 1 does not name the file"


def test_configs_hold_only_yaml_and_model_files(texts):
    for name in texts:
        if name.startswith("configs/"):
            assert name.endswith(".json" if name.startswith("configs/models/") else ".yaml"), name


@pytest.mark.parametrize("forbidden", [MACHINE_PATHS, ADDRESSES], ids=["a path of one machine", "a registry's address"])
def test_no_file_mentions(texts, forbidden):
    found = {name: match.group() for name, text in texts.items() if (match := re.search(forbidden, text))}
    assert found == {}


def test_no_module_is_longer_than_300_lines(texts):
    long = {name: length for name, text in texts.items() if name.endswith(".py") and (length := text.count("\n")) > 300}
    assert long == {}, "split by idea"


def test_every_module_says_what_it_is_for(texts):
    modules = {n: text for n, text in texts.items() if n.endswith(".py") and text and not n.startswith("tests/test_")}
    silent = [name for name, text in modules.items() if not text.startswith('"""')]
    assert silent == []


def test_what_must_run_may_be_run():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
