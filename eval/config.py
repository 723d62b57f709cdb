"""What a suite of evaluation tasks is made of: frozen dataclasses, torch-free, filled from YAML."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TaskConfig:
    """One measurement: its metrics are named `kind/name/...`."""

    kind: Literal["zero_shot", "retrieval", "relations", "counting", "negation"]
    name: str
    data: str
    templates: str | list[str] = "simple"
    classnames: str | list[str] | None = None

    def __post_init__(self):
        if self.kind != "zero_shot" and (self.classnames is not None or self.templates != "simple"):
            raise ValueError(f"templates and classnames belong to zero_shot tasks; {self.name} is a {self.kind} task")
        if self.classnames is not None and not self.classnames:
            raise ValueError(
                f"the classnames of {self.name} are empty: list them, name a file with one per line, or leave them out"
            )
        if not self.name or "/" in self.name:
            raise ValueError(f"a task needs a name without `/`, got {self.name!r}")
        if not self.data.strip():
            raise ValueError(f"the data of {self.name} is empty: name its shards, or its folder of class folders")


@dataclass(frozen=True)
class SuiteConfig:
    """Tasks that are run together; relative paths in them start at `root`, and that at the working folder."""

    tasks: tuple[TaskConfig, ...]
    root: str = "."

    def __post_init__(self):
        names = [f"{task.kind}/{task.name}" for task in self.tasks]
        if not names:
            raise ValueError("a suite needs at least one task")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two tasks are called {twice}: give each a name of its own")

    def place(self, path: str) -> str:
        """Put `root` before each relative path of a pattern (parts joined by `::`); `$NAME` and `~` are filled in."""
        root = os.path.expandvars(self.root)
        parts = [os.path.expanduser(os.path.expandvars(part)) for part in path.split("::")]
        return "::".join(part if "://" in part else str(Path(root).expanduser() / part) for part in parts)


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read a suite from a YAML file; overrides such as `root=FOLDER` or `tasks.0.data=FOLDER` win over it."""
    from softmoe_clip.data_pipelines.strict import load_strict

    return load_strict(SuiteConfig, path, overrides)
