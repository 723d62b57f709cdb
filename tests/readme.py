"""The README as a program: its blocks of commands, and the tree it draws."""

import re
from typing import NamedTuple

LANGUAGES = ("sh", "bash", "python")
NOT_RUN = re.compile(r"<!--\s*not run by the tests:\s*(.+?)\s*-->")
RUNS_TESTS = re.compile(r"\s*(?:make (?:check|test|test-slow)|\.ci/run)\b")  # they would run this test again
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")


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
    """Return the paths of the block that draws the tree: those that start a line, indented below their folder.

    Further entries may follow on the line (`cli.py config.py`; behind a folder: what lies in it); other words describe.
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
        paths += [above + entry for entry in further_entries(names[1:])]
    return paths


def further_entries(words: list[str]) -> list[str]:
    """Return the leading words that are names of files or folders."""
    entries = []
    for word in words:
        if not (PATH.fullmatch(word) and re.search(r"[\w*]\.\w+$|/$", word)):
            break
        entries.append(word)
    return entries
