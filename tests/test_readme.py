"""The README and the pages in docs/ are true: what they name exists, and their commands run in a fresh checkout."""

import os
import re
import signal
import subprocess

import pytest
from checkout import ROOT, copy_checkout, outside_environment
from readme import commands, fenced_blocks, tree_paths

README = (ROOT / "README.md").read_text()
# In the order in which their commands run: what one page makes the next may use.
PAGES = ("README.md", "docs/data.md", "docs/training.md", "docs/models.md", "docs/numbers.md", "docs/scaling.md")
MINUTES_PER_BLOCK = 20  # the first one makes the environment
EXAMPLE = """
Text, then a block:

```sh
make demo
make check    # not run: it runs this
```

<!-- not run by the tests: needs a cluster -->

```bash
accelerate launch train
```

* in a list

  ```python
  print("indented")
  ```

<!-- not run by the tests: this comment stands over text -->
More text.
```console
a result
```

~~~sh
make test
~~~

```
configs/            YAML only
  demo.yaml  suites/*.yaml  and more
softmoe_clip/       the program
├── cli.py config.py (no torch)
└── moe/            experts.py, soft.py (the layer). In words
    └── stats.py
data_pipelines/     files to batches
Makefile            two commands
```
"""


def test_blocks_are_found_with_language_line_and_reason():
    assert [(block.language, block.line, block.reason) for block in fenced_blocks(EXAMPLE)] == [
        ("sh", 4, None),
        ("bash", 11, "needs a cluster"),
        ("python", 17, None),
        ("console", 23, None),
        ("sh", 27, None),
        ("", 31, None),
    ]


def test_commands_are_what_a_reader_would_type_without_what_runs_the_tests():
    assert [block.text for block in commands(EXAMPLE)] == ["make demo\n", 'print("indented")\n']


def test_a_block_without_an_end_is_an_error():
    with pytest.raises(ValueError, match="line 2 has no end"):
        fenced_blocks("text\n```sh\nmake demo\n")


def test_tree_paths_follow_the_indentation():
    assert tree_paths(EXAMPLE) == [
        "configs/",
        "configs/demo.yaml",
        "configs/suites/*.yaml",
        "softmoe_clip/",
        "softmoe_clip/cli.py",
        "softmoe_clip/config.py",
        "softmoe_clip/moe/",
        "softmoe_clip/moe/experts.py",
        "softmoe_clip/moe/soft.py",
        "softmoe_clip/moe/stats.py",
        "data_pipelines/",
        "Makefile",
    ]


def test_every_page_is_read_and_the_readme_leads_to_it():
    assert sorted(PAGES[1:]) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
    assert [page for page in PAGES[1:] if f"]({page})" not in README] == []


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\((?!https?:)([\w./-]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_readme_lists_every_verb():
    from softmoe_clip.cli import app

    names = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    assert re.findall(r"^\| `([a-z-]+) ", README, re.MULTILINE) == names


def test_the_page_on_models_lists_every_architecture_and_router():
    from softmoe_clip.moe_config import ROUTER_SETTINGS

    page = (ROOT / "docs/models.md").read_text()
    names = [path.stem for path in (ROOT / "configs/models").glob("*.json")]
    assert [name for name in (*names, *ROUTER_SETTINGS) if f"`{name}`" not in page] == []


def test_every_path_of_the_tree_exists():
    paths = tree_paths(README)
    assert paths, "the README draws no tree"
    assert [path for path in paths if not list(ROOT.glob(path))] == []


def test_the_readme_has_commands():
    assert commands(README)


@pytest.mark.slow
def test_the_commands_run_word_for_word_in_a_fresh_checkout(tmp_path):
    """In order, as at one prompt: what a block writes is there for the next. `my_pictures` holds the reader's own."""
    checkout = copy_checkout(tmp_path / "softmoe-clip")
    write_pictures(checkout / "my_pictures")
    path = f"{checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for page in PAGES:
        for block in commands((ROOT / page).read_text()):
            program = ["python", "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
            status, printed = run_block([*program, block.text], checkout, outside_environment(PATH=path))
            assert status == 0, f"{page}, line {block.line}:\n{block.text}{printed[-4000:]}"


def run_block(command, folder, environment):
    """Return exit status and output; all that the block started ends with it or with its time."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=60 * MINUTES_PER_BLOCK)
        return process.returncode, printed
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return -1, process.communicate()[0] + f"\nended after {MINUTES_PER_BLOCK} minutes"


def write_pictures(folder, num_pictures=120):
    """Write a user's own pictures: X.jpg with its captions in X.txt, one per line."""
    from PIL import Image

    folder.mkdir()
    for i in range(num_pictures):
        colour = (i * 53 % 256, i * 97 % 256, i * 151 % 256)
        Image.new("RGB", (96, 80), colour).save(folder / f"{i:03d}.jpg")
        (folder / f"{i:03d}.txt").write_text(f"a plain picture of colour {i}\npicture number {i}\n")
