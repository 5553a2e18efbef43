"""Single values as they come from a command line or a JSON file: held to their types, and shown in messages."""

import dataclasses
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


def alternatives(kind: Any) -> tuple[tuple, bool]:
    """Splits a field's type into its types without `None`, and whether `None` is allowed."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(part for part in kinds if part is not type(None)), type(None) in kinds


def checked_value(name: str, value: Any, kind: Any) -> Any:
    """
    `value` as the type that the field is declared with, so that a JSON file is held to what an option is held to.

    Raises:
        ValueError: It is of another type.
    """
    kinds, optional = alternatives(kind)
    if value is None and optional:
        return None
    if get_origin(kinds[0]) is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(checked_value(name, part, get_args(kinds[0])[0]) for part in values)
    words = [word for part in kinds if get_origin(part) is Literal for word in get_args(part)]
    if type(value) in kinds or (isinstance(value, str) and value in words):
        return value
    if float in kinds and type(value) is int and abs(value) < 2**53:
        return float(value)
    wanted = [f"one of {', '.join(words)}"] if words else []
    wanted += [f"of type {part.__name__}" for part in kinds if isinstance(part, type)]
    raise ValueError(f"`{name}` must be {' or '.join(wanted)}, but it is {shortened(value)}.")


def checked_values(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON object, held to the fields of the settings class `cls`; unknown keys are an error."""
    kinds = {item.name: item.type for item in dataclasses.fields(cls)}
    unknown = [str(key) for key in given if key not in kinds]
    if unknown:
        raise ValueError(f"unknown key `{unknown[0]}`; the keys are {', '.join(kinds)}.")
    return {name: checked_value(name, value, kinds[name]) for name, value in given.items()}


def as_tuple(value: Any) -> tuple:
    """A tuple as it is, anything else as a tuple of one."""
    return value if isinstance(value, tuple) else (value,)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where the message alone says nothing."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def shortened(value: Any) -> str:
    """A value as messages show it: the beginning of a long one."""
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to spell out integers of thousands of digits.
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def user_path(name: str, text: str) -> Path:
    """
    A path that the user typed, with `~` for the home folder.

    Raises:
        ValueError: It is empty, which would otherwise mean the current folder.
    """
    if not text:
        raise ValueError(f"`{name}` is ''; give a path.")
    return Path(os.path.expanduser(text))
