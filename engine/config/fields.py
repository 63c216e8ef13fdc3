"""Options as dataclass fields with help, choices and bounds; parsers for YAML and command line.

A section is a frozen dataclass of options; a configuration is a frozen dataclass of sections. The
names of all options of a configuration are distinct, so a YAML file and the command line are flat.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from ..runtime.files import read_file, write_whole
from ..runtime.text import did_you_mean
from .spellings import translated

Configuration = TypeVar("Configuration")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> Any:
    """Declare a dataclass field with its help text (including the unit), choices and bounds."""
    bounds = {"at_least": at_least, "at_most": at_most, "above": above}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, **bounds})


def _options(cls: type) -> dict[str, tuple[str, dataclasses.Field[Any], Any]]:
    """Return option name -> (section name, field, type) of a configuration class, in order."""
    found = {}
    for section_name, section in typing.get_type_hints(cls).items():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            found[field.name] = (section_name, field, hints[field.name])
    return found


def _coerce(name: str, value: Any, hint: Any, choices: Sequence[str] | None) -> Any:
    """Convert `value` to the option's type; YAML gives 2e-5 as text, the command line any value."""
    kind = _kind(hint)
    says_none = isinstance(value, str) and value.lower() in ("none", "null")
    if value is None or (says_none and value not in (choices or ())):
        if type(None) in typing.get_args(hint):
            return None
        # "none" is a text like others where an option cannot be unset.
        if value is None or kind is not str:
            raise ValueError(f"{name}: a value is needed, got {value!r}.")
    problem = f"{name}: expected {kind.__name__}, got {value!r}."
    if kind is bool:
        if isinstance(value, bool):
            return value
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in words:
            raise ValueError(f"{problem} Write true or false.")
        return words[str(value).lower()]
    if kind is str and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if kind is str:
        return json.dumps(value) if isinstance(value, dict) else str(value)
    if isinstance(value, bool):
        raise ValueError(problem)
    if kind is int and isinstance(value, int):
        return value  # A float has room for 53 bits only.
    try:
        number = float(value)
        if kind is int:
            if not number.is_integer():  # '10.0' and 1e3 are accepted
                raise ValueError
            is_exact = isinstance(value, str) and value.lstrip("-").isdigit()
            return int(value) if is_exact else int(number)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(problem) from None
    if not math.isfinite(number):
        raise ValueError(f"{problem} A finite number is needed.")
    return number


def _check(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if value is None:
        return
    choices = metadata["choices"]
    if choices is not None and value not in choices:
        raise ValueError(f"{name}={value!r} is not a choice.{did_you_mean(str(value), choices)}")
    for bound, holds, words in (
        ("at_least", lambda limit: value >= limit, "at least"),
        ("at_most", lambda limit: value <= limit, "at most"),
        ("above", lambda limit: value > limit, "more than"),
    ):
        limit = metadata[bound]
        if limit is not None and not holds(limit):
            raise ValueError(f"{name}={value!r} is out of range: it must be {words} {limit}.")


def _known(cls: type) -> list[str]:
    """Names of all options of a configuration class, those of other programs included."""
    return [*_options(cls), *getattr(cls, "SPELLINGS", ())]


def build(cls: type[Configuration], values: Mapping[str, Any]) -> Configuration:
    """Make a configuration from a flat mapping of option names to values.

    A class with `SPELLINGS` takes names of other programs too; see `spellings.translated`.

    Raises:
        ValueError: an unknown name (the nearest is offered), a wrong type or a value out of range.
    """
    options = _options(cls)
    if hasattr(cls, "SPELLINGS"):
        values = translated(values)
    for name in values:
        if name not in options:
            raise ValueError(f"Unknown option {name!r}.{did_you_mean(name, _known(cls))}")
    sections: dict[str, dict[str, Any]] = {section: {} for section in typing.get_type_hints(cls)}
    for name, value in values.items():
        section, field, hint = options[name]
        value = _coerce(name, value, hint, field.metadata["choices"])
        _check(name, value, field.metadata)
        sections[section][name] = value
    hints = typing.get_type_hints(cls)
    return cls(**{section: hints[section](**chosen) for section, chosen in sections.items()})


def flatten(config: Any) -> dict[str, Any]:
    """Return option name -> value in the order of the sections: the inverse of `build`."""
    sections = (getattr(config, field.name) for field in dataclasses.fields(config))
    return {name: value for section in sections for name, value in vars(section).items()}


def write_yaml(config: Any, path: Path) -> None:
    """Write a configuration, section by section, to a file that `read_file` reads."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"# {section.name}")
        lines.append(yaml.safe_dump(vars(getattr(config, section.name)), sort_keys=False))
    write_whole(path, "\n".join(lines))


def command_line(config: Any, program: str) -> str:
    """Return the command line that gives `config`: every option that differs from its default."""
    words = [program]
    defaults = flatten(type(config)())
    for name, value in flatten(config).items():
        if value != defaults[name]:
            words.append(f"--{name}" if value is True else f"--{name} {shlex.quote(str(value))}")
    return " ".join(words)


class _Parser(argparse.ArgumentParser):
    """Argument parser that raises mistakes as ValueError, like a wrong YAML file."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message[0].upper() + message[1:] + ".")


_METAVARS = {str: "TEXT", int: "INT", float: "FLOAT", bool: "BOOL"}


def parser(cls: type, program: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of a configuration: an optional YAML or JSON file and one flag per option."""
    made = _Parser(
        prog=program,
        usage=f"{program} [config.yaml] [--option value ...]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("config_file", nargs="?", help="YAML or JSON file with any of the options")
    groups: dict[str, Any] = {}
    for name, (section, field, hint) in _options(cls).items():
        if section not in groups:
            groups[section] = made.add_argument_group(section)
        choices = field.metadata["choices"]
        words = field.metadata["help"].replace("%", "%%")
        groups[section].add_argument(
            f"--{name}",
            nargs="?" if hint is bool else None,
            const=True if hint is bool else None,
            metavar="|".join(choices) if choices else _METAVARS[_kind(hint)],
            help=f"{words} (default: {'unset' if field.default is None else field.default})",
        )
    for name in getattr(cls, "SPELLINGS", ()):
        made.add_argument(f"--{name}", nargs="?", const=True, help=argparse.SUPPRESS)
    return made


def _kind(hint: Any) -> type:
    """Return the type of an option's values other than None."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(kind for kind in kinds if kind is not type(None))


def parse(
    cls: type[Configuration], program: str, description: str, arguments: list[str]
) -> Configuration:
    """Make a configuration from the command line; flags override the file.

    Raises:
        ValueError: as `build`, and for an unknown flag (the nearest is offered).
    """
    values = given(cls, arguments, program, description)
    config_file = values.pop("config_file", None)
    from_file = read_file(config_file) if config_file else {}
    if hasattr(cls, "SPELLINGS"):
        # Each alone, so that a flag wins over the file under whatever name.
        values, from_file = translated(values, from_file), translated(from_file, values)
    return build(cls, {**from_file, **values})


def given(
    cls: type, arguments: list[str], program: str = "", description: str = ""
) -> dict[str, Any]:
    """Return option name -> text for the options on a command line; values are not checked.

    Raises:
        ValueError: an unknown flag (the nearest is offered).
    """
    known, unknown = parser(cls, program, description).parse_known_args(arguments)
    for flag in unknown:
        if flag.startswith("--"):
            name = flag[2:].split("=")[0].replace("-", "_")
            raise ValueError(
                f"Unknown flag {flag.split('=')[0]!r}.{did_you_mean(name, _known(cls))}"
            )
    values = vars(known)
    file = values.get("config_file")
    # Behind an option it may as well be a second value.
    if file is not None and file != arguments[0] and not Path(file).exists():
        unknown.insert(0, file)
    if unknown:
        raise ValueError(
            f"Unexpected argument {unknown[0]!r}. Options are written --name value; several values "
            "are joined by commas."
        )
    return values
