"""Prompts for zero-shot classification: named sets of templates, and how a class name is filled in."""

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from softmoe_clip.data_pipelines.sources.items import read_text

Template = str | Callable[[str], str]

# `{}` and `{c}` (as in CLIP_benchmark's files) stand for the class name, `{a}` for the name with its article.
TEMPLATES = {
    "plain": ("{}",),
    "simple": ("a photo of {a}.", "a picture of {a}.", "{a}", "a photo of the {}.", "a close-up photo of {a}."),
    "scenes": ("{a}", "a picture of {a}", "an image of {a}", "a drawing of {a}", "this is {a}", "there is {a}"),
}
PLACEHOLDER = re.compile(r"\{[ca]?\}")


def find_templates(templates: str | Sequence[str]) -> list[Template]:
    """Return a named set (`openai`: CLIP's 80 prompts, from open_clip), the lines of a .txt file, or the given list."""
    if not isinstance(templates, str):
        found = list(templates)
    elif templates == "openai":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return list(OPENAI_IMAGENET_TEMPLATES)
    elif templates in TEMPLATES:
        found = list(TEMPLATES[templates])
    elif templates.endswith(".txt"):
        found = [line for line in read_text(Path(templates)).splitlines() if line.strip()]
    else:
        names = [*TEMPLATES, "openai"]
        close = get_close_matches(templates, names, n=1)
        advice = (
            f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}, and a .txt file with one per line"
        )
        raise ValueError(f"no templates are called {templates!r}: {advice}")
    if not found:
        raise ValueError("the list of templates is empty: give at least '{}'")
    for template in found:
        if not PLACEHOLDER.search(template):
            raise ValueError(f"template {template!r} has no place for the class name: write {{}} or {{c}} there")
    return found


def prompts_of(templates: str | Sequence[str]) -> Callable[[str], list[str]]:
    """Return a function from a class name to its prompts (see `find_templates`)."""
    found = find_templates(templates)
    return lambda classname: [fill(template, classname) for template in found]


def fill(template: Template, classname: str) -> str:
    """Put a class name into all places of a template; braces inside the name stay as they are."""
    if callable(template):
        return template(classname)
    words = {"{}": classname, "{c}": classname, "{a}": f"{article(classname)} {classname}"}
    return PLACEHOLDER.sub(lambda place: words[place[0]], template)


def article(words: str) -> str:
    """Choose "an" before a written vowel, "a" before anything else."""
    return "an" if words[:1].lower() in tuple("aeiou") else "a"
