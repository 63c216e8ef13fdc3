"""Flat names, two spellings, and every way to mistype them."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fusedacl.engine.config.commands import AngleConfig, TSNEConfig
from fusedacl.engine.config.fields import build, command_line, flatten, option, parse, write_yaml
from fusedacl.engine.config.training import TrainingConfig
from fusedacl.engine.runtime.files import read_file


@dataclass(frozen=True)
class Shape:
    width: int = option(4, "cells", at_least=1)
    name: str | None = option(None, "what it is called")


@dataclass(frozen=True)
class Motion:
    speed: float = option(0.5, "100 % is light", above=0, at_most=1)
    mode: str = option("walk", "how", choices=("walk", "run"))
    loud: bool = option(False, "heard")


@dataclass(frozen=True)
class Config:
    shape: Shape = field(default_factory=Shape)
    motion: Motion = field(default_factory=Motion)


def parsed(*arguments: str) -> Config:
    return parse(Config, "program", "description", list(arguments))


def test_defaults_and_flags() -> None:
    assert parsed() == Config()
    config = parsed("--width", "7", "--loud", "--speed", "1e-3", "--mode", "run")
    assert config == Config(Shape(7, None), Motion(0.001, "run", True))
    assert parsed("--loud", "false").motion.loud is False


def test_file_and_flags_are_two_spellings(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    # YAML reads 5e-2, without a dot, as text.
    file.write_text("width: 9\nspeed: 5e-2\nname: [joy, 2]\n", encoding="utf-8")
    assert parsed(str(file)) == Config(Shape(9, "joy,2"), Motion(0.05))
    assert parsed(str(file), "--width", "3") == Config(Shape(3, "joy,2"), Motion(0.05))
    (tmp_path / "config.json").write_text(json.dumps({"name": "x"}), encoding="utf-8")
    assert parsed(str(tmp_path / "config.json")).shape.name == "x"


def test_a_written_configuration_reads_back(tmp_path: Path) -> None:
    config = Config(Shape(2, "none of it: 100 %"), Motion(0.25, "run", True))
    write_yaml(config, tmp_path / "config.yaml")
    assert build(Config, read_file(tmp_path / "config.yaml")) == config
    assert build(Config, flatten(config)) == config


def test_a_configuration_can_be_typed_again() -> None:
    config = Config(Shape(2, "it's"), Motion(0.25, "run", True))
    words = shlex.split(command_line(config, "program"))
    assert words[0] == "program"
    assert parsed(*words[1:]) == config
    assert command_line(Config(), "program") == "program"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    write_yaml(Config(Shape(2)), tmp_path / "config.yaml")

    def full(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left"):
        write_yaml(Config(Shape(3)), tmp_path / "config.yaml")
    monkeypatch.undo()
    assert build(Config, read_file(tmp_path / "config.yaml")).shape.width == 2


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = capsys.readouterr().out
    for words in ("--width INT", "cells (default: 4)", "--mode walk|run", "100 % is light"):
        assert words in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widht", "3"], "Unknown flag '--widht'. Did you mean 'width'?"),
        (["--width=3", "stray", "other"], "Unexpected argument 'other'"),
        (["--width", "three"], "width: expected int, got 'three'"),
        (["--width", "2.5"], "width: expected int, got '2.5'"),
        (["--width", "0"], "width=0 is out of range: it must be at least 1"),
        (["--width", "none"], "width: a value is needed"),
        (["--speed", "0"], "speed=0.0 is out of range: it must be more than 0"),
        (["--speed", "1.5"], "must be at most 1"),
        (["--speed", "nan"], "A finite number is needed"),
        (["--mode", "runn"], "mode='runn' is not a choice. Did you mean 'run'?"),
        (["--loud", "perhaps"], "Write true or false"),
        (["--width"], "expected one argument"),
        (["absent.yaml"], "'absent.yaml' does not exist"),
        (["--name", "3", "6"], "Unexpected argument '6'"),
        (["--name", "3", "6", "9"], "Unexpected argument '6'. Options are written --name value; s"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    if "stray" in arguments:
        (tmp_path / "stray").write_text("width: 3")
        arguments = [str(tmp_path / "stray") if a == "stray" else a for a in arguments]
    with pytest.raises(ValueError) as error:
        parsed(*arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht: 3", "Unknown option 'widht'. Did you mean 'width'?"),
        ("- width", "must hold `option: value` lines"),
        ("width: [", "cannot be read"),
        ("loud: 3", "Write true or false"),
        ("width: true", "width: expected int, got True"),
        ("width: 3\nname: x\nwidth: 4", "'width' is given twice"),
        ("width: 3\n'width': 4", "'width' is given twice"),
        ("width: {a: 1, b: 2, a: 1}", "'a' is given twice"),
        ('{"width": 3, "width": 3}', "'width' is given twice"),
        ('[{"a": 1, "a": 2}]', "'a' is given twice"),
    ],
)
def test_mistakes_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / ("config.json" if text[0] in "{[" else "config.yaml")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        parsed(str(file))
    assert message in str(error.value)


def test_yaml_may_override_what_it_merges(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("base: &base {width: 3, speed: 1}\nmine:\n  <<: *base\n  width: 4\n")
    assert read_file(file)["mine"] == {"width": 4, "speed": 1}


def test_what_is_no_configuration_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name, words in {
        "pipe.yaml": "is a named pipe",
        "loop.json": "is a symbolic link that leads in a circle",
        ".": "is a directory",
    }.items():
        with pytest.raises(ValueError, match=f"{words}.*name a YAML or JSON file"):
            read_file(tmp_path / name)


def test_whole_numbers_keep_all_digits(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"width: {2**60 + 1}\n", encoding="utf-8-sig")
    assert parsed(str(file)).shape.width == 2**60 + 1


@pytest.mark.parametrize(
    ("config", "largest"),
    [(TrainingConfig, 2**63 - 1), (AngleConfig, 2**63 - 1), (TSNEConfig, 2**32 - 1)],
)
def test_seeds_that_no_generator_takes(config: type, largest: int) -> None:
    assert flatten(build(config, {"seed": str(largest)}))["seed"] == largest
    for value in (largest + 1, str(largest + 1), 1e30):
        with pytest.raises(ValueError, match=f"seed=.* must be at most {largest}"):
            build(config, {"seed": value})
