"""The values of config fields: each has its field's type, be it given in Python, in JSON or on a command line."""

from __future__ import annotations

import ast
import dataclasses
import functools
import types
import typing
from typing import Any

from eso_jax.errors import require


@functools.cache  # without it, Python evaluates the annotations in every call
def types_of(kind: type) -> dict[str, Any]:
    """The fields of a section's class and their types."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def check_types(section: str, config: Any) -> None:
    """Raises an EsoError unless every field of a section has its type. Whole numbers in place of floats become floats,
    lists tuples."""
    for name, kind in types_of(config.__class__).items():
        value = read(f"{section}.{name}", getattr(config, name), kind)
        object.__setattr__(config, name, value)  # the section is frozen, but still being made


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The types of a union; any other type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _type_name(kind: Any) -> str:
    return " or ".join("None" if k is type(None) else str(k) if typing.get_origin(k) else k.__name__
                       for k in _kinds(kind))


def _fits(value: Any, kind: Any) -> bool:
    for option in _kinds(kind):
        if typing.get_origin(option) is tuple:
            parts = typing.get_args(option)
            if isinstance(value, (list, tuple)) and len(value) == len(parts) and all(map(_fits, value, parts)):
                return True
        elif option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return True
        elif isinstance(value, option) and isinstance(value, bool) == (option is bool):
            return True
    return False


def read(path: str, value: Any, kind: Any) -> Any:
    """A value of its field's type; raises an EsoError where it does not fit."""
    require(_fits(value, kind), path, value, f"must be of type {_type_name(kind)}")
    return _as_floats(value) if "float" in str(kind) else value


def _as_floats(value: Any) -> Any:
    """A value whose numbers are floats and whose lists are tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_as_floats, value))
    return None if value is None else float(value)


def parse(path: str, text: str, kind: Any) -> Any:
    """The value that a text stands for, by its field's type; raises an EsoError where it does not fit."""
    if str in _kinds(kind):
        return None if text == "None" and type(None) in _kinds(kind) else text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = float(text) if text.lower() in ("nan", "inf", "infinity") else text
    if int in _kinds(kind) and isinstance(value, float) and value.is_integer():
        value = int(value)  # train.steps=1e6
    require(_fits(value, kind), path, text, f"must be of type {_type_name(kind)}")
    return read(path, value, kind)
