"""Dataclass <- YAML <- ``key=value``: the whole configuration language of the recipes.

A recipe states its settings as a frozen dataclass. `parse` reads the YAML file and the
``key=value`` arguments of the command line into it; pydantic validates every value against the type
of its field and its constraints, as in `Annotated[int, Field(ge=1)]`. There is no nesting, no
interpolation and no inheritance between files.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import inspect
import json
import re
import reprlib
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from sammed3d_backbone.console import shortened
from sammed3d_backbone.files import read_text, reading

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")

# YAML 1.1, as PyYAML reads it, takes no for false and 1e-4 for text; YAML 1.2 does not.
SCALARS = {  # the first pattern that matches counts
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9]\d*)", "-+0123456789"),
    "float": (r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.inf|\.nan", "-+0123456789."),
}


def parse(
    cls: type[C],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    flags: Mapping[str, str] | None = None,
) -> tuple[C, dict[str, bool]]:
    """Parses a recipe's command line into its configuration and its flags.

    Args:
        cls: Dataclass of the configuration.
        argv: Arguments without the program name; `sys.argv` when left out.
        description: Shown by ``--help`` above the fields and their defaults.
        flags: Boolean flags that are not part of the configuration, name -> help; given as
            ``--some-flag``, returned as ``some_flag``.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="keys:\n" + "\n".join(f"  {line}" for line in _listed_fields(cls)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file with values for the keys below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    for name, meaning in (flags or {}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=meaning)
    args = parser.parse_intermixed_args(argv)
    try:
        configuration = load(cls, args.config, args.overrides)
        return configuration, {name: getattr(args, name) for name in flags or {}}
    except (ValueError, FileNotFoundError, RecursionError) as error:
        parser.error(shortened(str(error)))


def load(cls: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Reads a configuration from a YAML file, with ``key=value`` strings on top.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a flat mapping, or a key or value does not fit the dataclass.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}; pass one of recipes/configs/*.yaml")
    with reading(path):
        values = _read_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} is not a mapping of key: value lines; see recipes/configs/ for the form"
        )
    hints = typing.get_type_hints(cls)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not of the form key=value")
        is_text = hints.get(key) is str or {*typing.get_args(hints.get(key))} == {str, type(None)}
        as_it_is = is_text and text not in ("null", "~")  # a name 010 or true stays one
        values[key] = text if as_it_is else _read_yaml(text, repr(override))
    try:
        return build(cls, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def build(cls: type[C], values: Mapping[str, Any]) -> C:
    """A configuration from plain values, each validated against the type of its field.

    Raises:
        ValueError: If a key is unknown or missing, or a value does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    hints = typing.get_type_hints(cls, include_extras=True)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(hints)}"
            raise ValueError(f"unknown key {key!r}; {hint}")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values
        and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}; add it as key=value or to the file")
    fitted = {}
    for key, value in values.items():
        try:
            # As JSON, since pydantic then takes lists for tuples and whole numbers for floats, but
            # still no boolean for a number and no number for text.
            text = json.dumps(value, default=str)
            fitted[key] = TypeAdapter(hints[key]).validate_json(text, strict=True)
        except ValidationError as error:
            needed = " or ".join(each["msg"] for each in error.errors())
            needed = needed.replace("Input should be", "give").replace("give g", "give a number g")
            needed = needed.replace("give l", "give a number l").replace("or give", "or")
            kind = inspect.formatannotation(typing.get_type_hints(cls)[key])
            raise ValueError(f"{key}={reprlib.repr(value)}: {needed}, the type is {kind}") from None
    return cls(**fitted)


def dump(config: DataclassInstance) -> str:
    """The configuration as YAML that `load` reads back to an equal one."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples as lists
    return yaml.safe_dump(values, sort_keys=False)


def digest(config: DataclassInstance, leave_out: Collection[str] = ()) -> str:
    """Twelve hexadecimal digits that identify the values of a configuration but `leave_out`."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in leave_out}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def differences(
    one: DataclassInstance, other: DataclassInstance
) -> dict[str, tuple[object, object]]:
    """The keys in which two configurations of one class differ, with both values."""
    a, b = dataclasses.asdict(one), dataclasses.asdict(other)
    return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does, and no aliases, whose content can grow without end."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuses an alias; a flat configuration needs none."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that occurs twice, of which YAML itself would keep the last."""
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"the key {twice[0]!r} occurs twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] == "tag:yaml.org,2002:null"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _first) in SCALARS.items():
    _tag = f"tag:yaml.org,2002:{_kind}"
    _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list(_first))


def _read_yaml(text: str, source: str) -> object:
    try:
        content: object = yaml.load(text, _Loader)  # a safe loader
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from None
    return content


def _listed_fields(cls: type[DataclassInstance]) -> list[str]:
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
