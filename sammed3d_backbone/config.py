"""Dataclass <- YAML <- ``key=value``: the whole configuration language of the recipes.

A recipe states its knobs as a frozen dataclass of plain fields. `parse` reads the YAML file and the
``key=value`` arguments of the command line into it; what a field cannot hold is an error that names
the key. There is no nesting, no interpolation and no inheritance between files.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import json
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")


def parse(
    cls: type[C],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    flags: Mapping[str, str] | None = None,
) -> tuple[C, dict[str, bool]]:
    """The configuration that a recipe's command line asks for, and which of its flags are set.

    Args:
        cls: Dataclass of the recipe's knobs.
        argv: Arguments without the program name; the command line when left out.
        description: Shown by ``--help``, above the knobs and their defaults.
        flags: Name -> help of what is no knob, since it changes nothing of a run: given as
            ``--some-flag``, returned as ``some_flag``.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="knobs:\n" + "\n".join(f"  {line}" for line in _knobs(cls)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file with values for the knobs below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    for name, meaning in (flags or {}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=meaning)
    args = parser.parse_intermixed_args(argv)
    try:
        configuration = load(cls, args.config, args.overrides)
        return configuration, {name: getattr(args, name) for name in flags or {}}
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def load(cls: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """A configuration from a YAML file, with ``key=value`` strings on top.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no flat mapping, or a key or value does not fit the dataclass.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}; pass one of recipes/configs/*.yaml")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no key: value lines; see recipes/configs/ for the form")
    hints = typing.get_type_hints(cls)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not of the form key=value")
        if _is_text(hints.get(key)) and text not in ("null", "~"):
            values[key] = text  # YAML would read 010 as a number and yes as true
            continue
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{override!r} is not valid YAML behind the =: {error}") from None
    try:
        return build(cls, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def build(cls: type[C], values: Mapping[str, Any]) -> C:
    """A configuration from plain values, each brought to its field's type.

    Raises:
        ValueError: If a key is unknown or missing, or a value does not fit.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(fields)}"
            raise ValueError(f"unknown key {key!r}{hint}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}; add it as key=value or to the file")
    return cls(**{key: _fit(key, hints[key], value) for key, value in values.items()})


def dump(config: DataclassInstance) -> str:
    """The configuration as YAML that `load` reads back to an equal one."""
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(values, sort_keys=False)


def digest(config: DataclassInstance, leave_out: Collection[str] = ()) -> str:
    """Twelve letters that stand for a configuration's values, but those of the keys left out."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in leave_out}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def differences(
    one: DataclassInstance, other: DataclassInstance
) -> dict[str, tuple[object, object]]:
    """The keys in which two configurations of one class differ, with both values."""
    a, b = dataclasses.asdict(one), dataclasses.asdict(other)
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


def _is_text(hint: object) -> bool:
    """Whether a field holds a string, or a string or None."""
    return hint is str or {*typing.get_args(hint)} == {str, type(None)}


def _fit(key: str, hint: object, value: object) -> object:
    """The value brought to the type its field declares."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        (hint,) = (choice for choice in choices if choice is not type(None))
        return _fit(key, hint, value)
    if origin is typing.Literal:
        if value is False and "no" in choices:
            value = "no"  # YAML 1.1 reads a bare no as false
        if value not in choices:
            raise ValueError(f"{key}={value!r}: give one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if choices[-1] is not Ellipsis and len(items) != len(choices):
            raise ValueError(f"{key}={value!r}: give {len(choices)} values, as [a, b, ...]")
        return tuple(_fit(key, choices[0], item) for item in items)
    return _fit_scalar(key, hint, value)


def _fit_scalar(key: str, hint: object, value: object) -> object:
    """The value as a bool, int, float or str."""
    if isinstance(value, bool) is not (hint is bool):
        pass  # Python counts booleans as integers; a configuration does not
    elif hint is str and isinstance(value, (str, int, float)):
        return str(value)
    elif hint is float and isinstance(value, (str, int, float)):
        # YAML 1.1 reads 1e-4 (without a dot) as a string, and people write it all the time.
        with contextlib.suppress(ValueError):
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ValueError(f"{key}={value!r}: give a value of type {getattr(hint, '__name__', hint)}")


def _knobs(cls: type[DataclassInstance]) -> list[str]:
    """One line per field: name, type and default."""
    lines = []
    for field in dataclasses.fields(cls):
        default = repr(field.default)
        if field.default is dataclasses.MISSING:
            default = "(required)"
            if field.default_factory is not dataclasses.MISSING:
                default = repr(field.default_factory())
        kind = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        lines.append(f"{field.name}: {kind} = {default}")
    return lines
