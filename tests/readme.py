"""The README as a program: its blocks of commands, and the tree it draws."""

import re
from typing import NamedTuple

LANGUAGES = ("sh", "bash", "python")
NOT_RUN = re.compile(r"<!--\s*not run by the tests:\s*(.+?)\s*-->")
RUNS_TESTS = re.compile(r"\s*(?:make (?:check|test|test-slow)|\.ci/run)\b")  # they would run this test again
FILE = re.compile(r"[\w.*/-]*[\w*]\.(?:py|yaml|json|toml|md|html|j2|lock)\b")


class Block(NamedTuple):
    """A fenced block: what stands in it, from which line on, and why it is not run, if it is not."""

    language: str
    text: str
    line: int
    reason: str | None


def fenced_blocks(markdown: str) -> list[Block]:
    """Return the fenced blocks; the line of text before one may be `<!-- not run by the tests: REASON -->`."""
    blocks, above, lines = [], "", iter(enumerate(markdown.splitlines(), start=1))
    for number, line in lines:
        if not (fence := re.fullmatch(r"( *)(`{3,}|~{3,})\s*(\w*).*", line)):
            above = line if line.strip() else above
            continue
        indent, marks, language = fence.groups()
        body = []
        for _, inner in lines:
            if inner.strip() == marks:
                break
            body.append(inner.removeprefix(indent))
        else:
            raise ValueError(f"the block of line {number} has no end")
        skipped = NOT_RUN.search(above)
        blocks.append(Block(language, "\n".join(body) + "\n", number, skipped and skipped.group(1)))
        above = ""
    return blocks


def commands(markdown: str) -> list[Block]:
    """Return the blocks that the tests run, in order, without the lines that run the tests."""
    blocks = []
    for block in fenced_blocks(markdown):
        kept = [line for line in block.text.splitlines(keepends=True) if not RUNS_TESTS.match(line)]
        if block.language in LANGUAGES and not block.reason and "".join(kept).strip():
            blocks.append(block._replace(text="".join(kept)))
    return blocks


def tree_paths(markdown: str) -> list[str]:
    """Return the paths of the block that draws the tree: what starts a line, indented below its folder.

    File names in the rest of the line are paths too: beside the file that starts it, in the folder that starts it.
    """
    trees = [
        block.text for block in fenced_blocks(markdown) if re.search(r"^\W*data_pipelines/", block.text, re.MULTILINE)
    ]
    paths, parents = [], []
    for line in (trees[0] if trees else "").splitlines():
        drawn = re.sub("[│├└─]", " ", line)
        names = drawn.split()
        if not names:
            continue
        indent = len(drawn) - len(drawn.lstrip())
        parents = [(depth, folder) for depth, folder in parents if depth < indent]
        above = parents[-1][1] if parents else ""
        paths.append(above + names[0])
        if names[0].endswith("/"):
            above += names[0]
            parents.append((indent, above))
        paths += [above + file for file in FILE.findall(drawn.strip().removeprefix(names[0]))]
    return paths
