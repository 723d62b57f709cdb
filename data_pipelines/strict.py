"""Configs that forgive nothing: YAML and `a.b=value` overrides into frozen dataclasses, each mistake one sentence."""

import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


def load_strict(dataclass_type: type[Config], path_or_dict: str | Path | dict, overrides: Sequence[str] = ()) -> Config:
    """Build `dataclass_type` from a YAML file (or a dict) and `a.b=value` overrides, which win over the file.

    `${oc.env:NAME}` and `${other.key}` are resolved, `~/` is the home folder. What is not given keeps the default of
    its field, down to single keys of nested configs. An unknown key, a wrong type, a missing file or broken YAML raises
    ValueError: one sentence.
    """
    is_dict = isinstance(path_or_dict, dict)
    source = "the config" if is_dict else str(path_or_dict)
    before = path_or_dict if is_dict else read_yaml(path_or_dict)
    tree = resolved(apply_overrides(before, overrides), source)
    given = [override.split("=", 1)[0].strip() for override in overrides]

    def place(key: str) -> str:
        """Say whether a wrong key came from an override or from the file."""
        inside = [name for name in given if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")]
        return "the overrides" if key and inside else source

    def known_keys() -> list[str]:
        return list(all_keys(dataclass_type))

    def only_parts(key: str) -> bool:
        """Say whether overrides set single keys of a mapping that was not given as a whole."""
        whole = holds(before, key) or any(f"{key}.".startswith(f"{name}.") for name in given)
        return not whole and any(name.startswith(f"{key}.") for name in given)

    return build(dataclass_type, tree, "", MISSING, Context(place, known_keys, only_parts))


def read_yaml(path: str | Path) -> dict:
    """Read a YAML file that holds a mapping; an empty file is an empty mapping."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import KeyValidationError, OmegaConfBaseException

    try:
        tree = OmegaConf.create(Path(path).read_text(encoding="utf-8").strip() or "{}")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the config {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    except yaml.YAMLError as error:
        line = getattr(error, "problem_mark", None)
        where = f" line {line.line + 1}" if line else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{path}{where} is not valid YAML: {reason}") from None
    except KeyValidationError as error:  # of what YAML reads as a key, omegaconf refuses null alone
        inside = f" in {error.full_key}" if error.full_key else ""
        raise ValueError(f"{path} has the key null{inside}: write it in quotes, as text, or remove it") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or 'a value'} in {path}: {first_line(error)}") from None
    tree = OmegaConf.to_container(tree, resolve=False)
    # omegaconf reads a file that holds one bare word as {word: None}.
    if not isinstance(tree, dict) or (len(tree) == 1 and ":" not in Path(path).read_text(encoding="utf-8")):
        raise ValueError(f"{path} must hold `key: value` lines at its top level")
    return tree


def holds(tree: Any, key: str) -> bool:
    """Tell whether nested mappings hold a dotted key."""
    name, _, rest = key.partition(".")
    return isinstance(tree, dict) and name in tree and (not rest or holds(tree[name], rest))


def apply_overrides(tree: dict, overrides: Sequence[str]) -> Any:
    """Set each `a.b=value` in the tree (`tasks.0.name=value` for an item of a list), reading values as YAML."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.create(tree)
    for override in overrides:
        key, equals, _ = (part.strip() for part in override.partition("="))
        if not equals or not key or not all(key.split(".")):
            raise ValueError(f"override {override!r} must look like a.b=value")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={override.partition('=')[2]}"]))["value"]
            OmegaConf.update(tree, key, value, merge=False, force_add=True)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or first_line(error)
            raise ValueError(
                f"override {override!r} is not valid YAML ({reason}): write a text with brackets or commas in quotes"
            ) from None
        except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"override {override!r} cannot be applied: {first_line(error)}") from None
        if " #" in override and "#" not in str(value):
            raise ValueError(f"override {override!r}: YAML drops what stands after ' #', put the value in quotes")
    return tree


def resolved(tree: Any, source: str) -> dict:
    """Turn the omegaconf tree into plain dicts and lists with all interpolations filled in."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{getattr(error, 'full_key', None) or 'a value'} in {source}: {first_line(error)}") from None


class Context(NamedTuple):
    """What messages tell of a config: where a key was set, all keys there are, whether only parts of a mapping were."""

    place: Callable[[str], str]
    known_keys: Callable[[], list[str]]
    only_parts: Callable[[str], bool]


def build(hint: Any, value: Any, key: str, default: Any, context: Context) -> Any:
    """Check `value` against the type `hint`; convert lists to tuples, whole floats to ints, mappings to dataclasses."""
    origin, item = get_origin(hint), partial(build, default=MISSING, context=context)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return build_union(hint, value, key, default, context)
    if is_dataclass(hint) and isinstance(value, dict):
        return build_dataclass(hint, value, key, default, context)
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in get_args(hint)):
        return value
    if (origin or hint) in (list, tuple, Sequence) and isinstance(value, (list, tuple)):
        hints = item_hints(hint, len(value))
        if len(hints) == len(value):
            items = [item(hint, part, f"{key}.{i}") for i, (hint, part) in enumerate(zip(hints, value, strict=True))]
            return items if (origin or hint) is list else tuple(items)
    if (origin or hint) is dict and isinstance(value, dict):
        refuse_parts(key, default, context)
        names, values = get_args(hint) or (Any, Any)
        return {item(names, name, f"{key}.{name}"): item(values, part, f"{key}.{name}") for name, part in value.items()}
    if hint in (str, bool, NoneType) and isinstance(value, hint):
        # No shell fills in what stands after `key=`, and not all that open a path do.
        return os.path.expanduser(value) if hint is str and value.startswith("~/") else value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and (hint is float or (hint is int and float(value).is_integer())):
        return hint(value)
    quotes = ": write it in quotes" if hint is str and is_number else ""
    got = f"{value!r} ({type(value).__name__}){quotes}"
    raise ValueError(f"{key or 'the top level'} in {context.place(key)} must be {in_words(hint)}, got {got}")


def refuse_parts(key: str, default: Any, context: Context) -> None:
    """Refuse overrides of single keys of a mapping where a default would be gone without a word."""
    if isinstance(default, dict) and default and context.only_parts(key):
        raise ValueError(
            f"{key} in the overrides would lose the keys of its default ({', '.join(default)}): "
            f"give all that it is to hold, as in {key}={{...}}"
        )


def build_union(hint: Any, value: Any, key: str, default: Any, context: Context) -> Any:
    """Take the first member of the union that fits; complain about the only one that could have been meant."""
    members = [member for member in get_args(hint) if member is not NoneType]
    if value is None and len(members) < len(get_args(hint)):
        return None
    meant = [member for member in members if is_dataclass(member)] if isinstance(value, dict) else []
    if len(members) == 1 or len(meant) == 1:
        return build((meant or members)[0], value, key, default, context)
    for member in members:
        try:
            return build(member, value, key, default, context)
        except ValueError:
            continue
    raise ValueError(f"{key} in {context.place(key)} must be {in_words(hint)}, got {value!r} ({type(value).__name__})")


def build_dataclass(cls: type[Config], values: dict, key: str, default: Any, context: Context) -> Config:
    """Fill a dataclass from a mapping, on top of the default that its field has in the config around it."""
    hints, prefix = get_type_hints(cls), f"{key}." if key else ""
    settable = {field.name: field for field in fields(cls) if field.init}
    for name in values:
        if name not in settable:
            full = f"{prefix}{name}"
            advice = nearest(str(name), prefix, settable, context.known_keys)
            raise ValueError(f"unknown key {full} in {context.place(full)}: {advice}")
    whole = default if isinstance(default, cls) else None
    missing = [n for n, f in settable.items() if n not in values and whole is None and default_of(f) is MISSING]
    if missing:
        full = f"{prefix}{missing[0]}"
        raise ValueError(f"{full} is missing in {context.place(full)}: it has no default")
    parts = {
        name: build(
            hints[name], part, f"{prefix}{name}", getattr(whole, name) if whole else default_of(settable[name]), context
        )
        for name, part in values.items()
    }
    try:
        return replace(whole, **parts) if whole else cls(**parts)
    except ValueError as error:
        raise ValueError(f"{key} in {context.place(key)}: {error}" if key else str(error)) from None


def default_of(field: Any) -> Any:
    """Return the default of a dataclass field, MISSING where it has none."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def item_hints(hint: Any, length: int) -> list:
    """Spread list[T], tuple[T, ...] and tuple[A, B] into one type per item."""
    args = get_args(hint) or (Any, ...)
    if get_origin(hint) is tuple and Ellipsis not in args:
        return list(args)
    return [args[0]] * length


def all_keys(hint: Any, prefix: str = "") -> list[str]:
    """List every full key that a config may set, sections and their contents."""
    if not is_dataclass(hint):
        return [key for member in get_args(hint) for key in all_keys(member, prefix)]
    keys = []
    for field in fields(hint):
        keys += [f"{prefix}{field.name}", *all_keys(get_type_hints(hint)[field.name], f"{prefix}{field.name}.")]
    return keys


def nearest(name: str, prefix: str, siblings: Sequence[str], known_keys: Any) -> str:
    """Advise on a wrong name: the closest one beside it, else the same name in another section, else all of them."""
    if close := get_close_matches(name, list(siblings), n=1, cutoff=0.6):
        return f"did you mean {prefix}{close[0]}?"
    elsewhere = {key.rsplit(".", 1)[-1]: key for key in reversed(known_keys())}
    if close := get_close_matches(name, list(elsewhere), n=1, cutoff=0.75):
        return f"did you mean {elsewhere[close[0]]}?"
    return f"the keys there are {', '.join(siblings)}"


def in_words(hint: Any) -> str:
    """Name a type as a user would."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(in_words(member) for member in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if is_dataclass(hint):
        return f"a section with the keys {', '.join(field.name for field in fields(hint))}"
    if origin is tuple and Ellipsis not in args:
        return f"a list of {len(args)} values ({', '.join(in_words(arg) for arg in args)})"
    if (origin or hint) in (list, tuple, Sequence):
        return f"a list (each item {in_words(args[0])})" if args else "a list"
    names = {
        str: "a string",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        NoneType: "null",
        Any: "anything",
    }
    return "a mapping" if (origin or hint) is dict else names.get(hint, str(hint))


def first_line(error: Exception) -> str:
    """Keep the first line of a library's message; the rest names its own types."""
    line = str(error).strip().split("\n")[0] or type(error).__name__
    return line.removeprefix("KeyError raised while resolving interpolation: ").strip('"')
