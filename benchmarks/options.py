"""The options of `fusedacl bench loss | angle | growth`, and the sizes of the presets."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engine.config.fields import option
from ..engine.runtime.text import did_you_mean
from .measuring.environment import machine_name
from .measuring.memory import Child
from .measuring.result_file import default_directory
from .suites.gate.shapes import BERT_BASE
from .suites.gate.suite import TASKS
from .suites.loss.case import LOSSES
from .suites.runner import Settings
from .suites.suite import check_names

PRESETS = ("quick", "full")
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "float16", "bfloat16")
COMPILED = "dense torch.compile"
# What a preset leaves out, unless providers are named.
SKIPPED = {
    "quick": {COMPILED: f"compiling takes long: --providers '{COMPILED}' or --preset full"},
    "full": {},
}
# On GPUs only where --device says so; the CPU's sizes stop where a call takes seconds.
SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("cpu", "quick"): {
        "rows": "1024", "widths": "64", "classes": "2", "exits": "1,12", "parameters": "2000000",
        "dtypes": "float32", "rounds": 5, "case_seconds": 1.0,
    },
    ("cpu", "full"): {
        "rows": "1024,4096", "widths": "64,768", "classes": "2,150", "exits": "1,12",
        "parameters": f"{BERT_BASE}", "dtypes": "float32", "rounds": 15, "case_seconds": 20.0,
    },
    ("cuda", "quick"): {
        "rows": "4096", "widths": "64,768", "classes": "2", "exits": "1,11",
        "parameters": "10000000", "dtypes": "float16,float32", "rounds": 5, "case_seconds": 5.0,
    },
    ("cuda", "full"): {
        "rows": "16384,32768,65536", "widths": "64,128,256,768", "classes": "2", "exits": "1,11",
        "parameters": f"{BERT_BASE},335000000", "dtypes": "float16,bfloat16,float32", "rounds": 15,
        "case_seconds": 60.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class What:
    losses: str = option(",".join(LOSSES), "loss: supcon (one batch), acl (N samples, K labels)")
    tasks: str = option(",".join(TASKS), "angle: dot_norm, combine (with clipping), gate (both)")
    rows: str | None = option(None, "M of supcon_loss, as 1024,4096 (unset: the preset's)")
    samples: int = option(32, "N of acl_loss, texts a batch", at_least=2)
    widths: str | None = option(None, "d of the rows; acl_loss takes the first")
    classes: str | None = option(None, "K of acl_loss, label embeddings")
    exits: str | None = option(None, "E of acl_loss, exits in one call")
    parameters: str | None = option(None, "elements of each list of gradients, as 1000000")
    dtypes: str | None = option(None, f"of {', '.join(DTYPES)}")
    providers: str | None = option(
        None, "names as the tables have them, with commas between (unset: the preset's)"
    )


@dataclass(frozen=True)
class How:
    preset: str = option("full", "quick: under two minutes for all suites", choices=PRESETS)
    device: str = option("cpu", "what computes", choices=DEVICES)
    threads: int = option(2, "CPU threads", at_least=1)
    rounds: int | None = option(None, "how often everything is timed, at most", at_least=1)
    case_seconds: float | None = option(None, "of timing a case, about", above=0)
    peaks: bool = option(True, "measure peak memory (on a CPU in a child process)")
    output_dir: str | None = option(
        None,
        "where the JSON file goes (unset: benchmarks/results/<machine> for all of the full preset "
        "in a checkout, else runs/bench/<machine>)",
    )


@dataclass(frozen=True)
class BenchConfig:
    what: What = field(default_factory=What)
    how: How = field(default_factory=How)


def sizes(config: BenchConfig) -> dict[str, Any]:
    """The options that have a preset's value where none is given: lists, rounds, seconds.

    Raises:
        ValueError: a size that is no whole number above 0, an unknown dtype, a missing device.
    """
    chosen = dict(SIZES[config.how.device, config.how.preset])
    for section in (config.what, config.how):
        chosen |= {
            name: getattr(section, name)
            for name in chosen
            if getattr(section, name, None) is not None
        }
    for name in ("rows", "widths", "classes", "exits", "parameters"):
        chosen[name] = whole_numbers(name, chosen[name])
    chosen["dtypes"] = names_of("dtypes", chosen["dtypes"], DTYPES)
    if config.what.dtypes is None and config.how.device == "cuda" and not _has_bfloat16():
        chosen["dtypes"] = [name for name in chosen["dtypes"] if name != "bfloat16"]
    chosen["losses"] = names_of("losses", config.what.losses, LOSSES)
    chosen["tasks"] = names_of("tasks", config.what.tasks, TASKS)
    return chosen


def _has_bfloat16() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def whole_numbers(name: str, text: str) -> list[int]:
    """A list of sizes.

    Raises:
        ValueError: naming what is no size.
    """
    found = []
    for part in text.split(","):
        if not part.strip().isdigit() or int(part) < 1:
            raise ValueError(
                f"{name}={text!r}: {part.strip()!r} is no whole number above 0. Write 1024,4096."
            )
        found.append(int(part))
    return list(dict.fromkeys(found))


def names_of(name: str, text: str, known: tuple[str, ...]) -> list[str]:
    """A list of choices.

    Raises:
        ValueError: naming what is no choice, with the nearest.
    """
    found = [part.strip() for part in text.split(",")]
    for part in found:
        if part not in known:
            raise ValueError(f"{name}={text!r}: {part!r} is no choice.{did_you_mean(part, known)}")
    return list(dict.fromkeys(found))


def provider_names(text: str | None, known: list[str]) -> tuple[str, ...]:
    """None for all.

    Raises:
        ValueError: naming what is no provider, with the nearest.
    """
    if text is None:
        return ()
    names = [name.strip() for name in text.split(",")]
    check_names(names, known)
    return tuple(names)


def settings_of(
    config: BenchConfig, chosen: dict[str, Any], names: tuple[str, ...], child: Child
) -> Settings:
    """
    Raises:
        ValueError: there is no such device here.
    """
    device = torch.device(config.how.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device='cuda': torch {torch.__version__} finds no CUDA device here. Use --device "
            "cpu; python -m fusedacl.benchmarks.floors.loss_and_gate prints what a GPU could reach."
        )
    return Settings(
        device=device,
        threads=config.how.threads,
        rounds=chosen["rounds"],
        case_seconds=chosen["case_seconds"],
        providers=names,
        skipped=SKIPPED[config.how.preset],
        child=child if config.how.peaks else None,
    )


def output_directory(config: BenchConfig) -> Path:
    if config.how.output_dir is not None:
        return Path(config.how.output_dir)
    # A part of the full preset must not take the place of a whole one's file.
    preset = config.how.preset if config.what == What() else "custom"
    return default_directory(machine_name(torch.device(config.how.device)), preset)
