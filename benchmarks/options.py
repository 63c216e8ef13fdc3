"""The options of every suite, and the sizes of the presets."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..engine.config.fields import option
from ..engine.runtime.text import did_you_mean
from ..kernels.contrastive.tiled.loss import GPU_TILE
from .measuring.environment import machine_name
from .suites.gate.case import BERT_BASE
from .suites.gate.suite import TASKS
from .suites.loss.case import LOSSES
from .suites.scaling.cost_model import Link, Machine, Problem
from .suites.scaling.suite import RankOptions
from .suites.step.names import CASES, WORDS

PRESETS = ("quick", "full")
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "float16", "bfloat16")
COMPILED = "dense torch.compile"
# Providers that a preset leaves out unless they are named.
SKIPPED = {
    "quick": {COMPILED: f"compiling takes long: --providers '{COMPILED}' or --preset full"},
    "full": {},
}
# The CPU's sizes end where one call takes seconds.
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
RANK_SIZES: dict[str, dict[str, Any]] = {
    "quick": {"world_sizes": "1,2", "num_samples": 64, "num_labels": 5, "width": 32, "rounds": 2},
    "full": {
        "world_sizes": "1,2,4", "num_samples": 512, "num_labels": 77, "width": 768, "rounds": 5,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    preset: str = option(
        "full", "quick takes less than two minutes for all suites", choices=PRESETS
    )
    threads: int = option(2, "number of CPU threads", at_least=1)
    output_dir: str | None = option(
        None,
        "directory of the result file (unset: benchmarks/results/<machine> for the whole full "
        "preset in a checkout, else runs/bench/<machine>)",
    )


@dataclass(frozen=True)
class How(Run):
    device: str = option("cpu", "device to measure", choices=DEVICES)
    rounds: int | None = option(None, "largest number of samples per provider", at_least=1)
    case_seconds: float | None = option(None, "approximate seconds of timing per case", above=0)
    peaks: bool = option(True, "measure peak memory (on a CPU in a child process)")


@dataclass(frozen=True)
class RankRun(Run):
    threads: int = option(1, "number of CPU threads per rank", at_least=1)


@dataclass(frozen=True)
class What:
    losses: str = option(
        ",".join(LOSSES),
        "losses to time: supcon (one batch), acl (N samples, K label embeddings), acl_cl (teacher)",
    )
    tasks: str = option(
        ",".join(TASKS), "gate tasks to time: dot_norm, combine (with clipping), gate (both)"
    )
    rows: str | None = option(None, "M of supcon_loss, such as 1024,4096 (unset: by the preset)")
    samples: int = option(32, "N of acl_loss, texts per batch", at_least=2)
    widths: str | None = option(None, "d, width of the rows; acl_loss uses the first one")
    classes: str | None = option(None, "K of acl_loss, number of label embeddings")
    exits: str | None = option(None, "E of acl_loss, exits in one call")
    parameters: str | None = option(None, "elements in each list of gradients, such as 1000000")
    dtypes: str | None = option(None, f"data types, from {', '.join(DTYPES)}")
    providers: str | None = option(
        None, "provider names as printed in the tables, comma-separated (unset: by the preset)"
    )


class Config:
    """Options of a suite: `what` to measure and `how`."""

    what: Any
    how: Any

    @property
    def is_whole(self) -> bool:
        """Return whether the whole preset is measured, so that its file may be committed."""
        default = replace(type(self.how)(), **{
            name: getattr(self.how, name)
            for name in ("preset", "output_dir", "device")
            if hasattr(self.how, name)
        })  # fmt: skip
        return self.has_all_cases and self.how == default

    @property
    def has_all_cases(self) -> bool:
        return self.what == type(self.what)()


@dataclass(frozen=True)
class BenchConfig(Config):
    """Options of loss, angle, growth and all."""

    what: What = field(default_factory=What)
    how: How = field(default_factory=How)


@dataclass(frozen=True)
class Steps:
    providers: str | None = option(None, f"trainers, from {', '.join(WORDS)} (unset: all)")
    cases: str | None = option(
        None,
        f"cases, from {', '.join(CASES)} (unset: all); the file is then named after them",
    )


@dataclass(frozen=True)
class StepConfig(Config):
    what: Steps = field(default_factory=Steps)
    how: Run = field(default_factory=Run)

    @property
    def has_all_cases(self) -> bool:
        return self.what.providers is None

    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Providers and cases, empty for all; ValueError for an unknown name."""
        providers = names_of("providers", self.what.providers, WORDS)
        return providers, names_of("cases", self.what.cases, CASES)


@dataclass(frozen=True)
class Texts:
    data_dir: str | None = option(
        None, "directory with mrpc/ (unset: $FUSEDACL_DATA if it has it, else built-in texts)"
    )


@dataclass(frozen=True)
class ExitsConfig(Config):
    what: Texts = field(default_factory=Texts)
    how: Run = field(default_factory=Run)
    has_all_cases = True


@dataclass(frozen=True)
class Nothing:
    """No options but how."""


@dataclass(frozen=True)
class LoopsConfig(Config):
    what: Nothing = field(default_factory=Nothing)
    how: RankRun = field(default_factory=RankRun)


@dataclass(frozen=True)
class WiderConfig(Config):
    what: Nothing = field(default_factory=Nothing)
    how: Run = field(default_factory=Run)


@dataclass(frozen=True)
class Ranks:
    world_sizes: str | None = option(
        None, "numbers of ranks on this machine, in ascending order, such as 1,2,4"
    )
    num_samples: int | None = option(None, "N, samples per rank", at_least=1)
    num_labels: int | None = option(None, "K, label embeddings", at_least=1)
    width: int | None = option(None, "d, width of the rows", at_least=1)
    rounds: int | None = option(None, "samples per method", at_least=1)
    timeout: float = option(900.0, "seconds allowed for each number of ranks", above=0)


@dataclass(frozen=True)
class ModelledMachine:
    """A machine that is modelled at given rates, beside this one at measured rates."""

    memory_budget_gb: float = option(8.0, "GB of a rank's memory that the loss may use", above=0)
    matrix_tflops: float | None = option(
        None, "another machine to model: TFLOP/s of matrix products per rank", above=0
    )
    giga_exponentials: float | None = option(None, "10^9 exponentials/s per rank", above=0)
    memory_gb: float | None = option(None, "GB of memory per rank", above=0)
    message_us: float | None = option(None, "microseconds per message between nodes", above=0)
    link_gb_s: float | None = option(None, "GB/s per rank and direction between nodes", above=0)
    ranks_per_node: int = option(1, "ranks per node", at_least=1)
    node_message_us: float | None = option(
        None, "microseconds per message within a node (unset: message_us)", above=0
    )
    node_link_gb_s: float | None = option(
        None, "GB/s per rank and direction within a node (unset: link_gb_s)", above=0
    )
    dtype: str = option(
        "float16", "data type on the modelled machine", choices=("float16", "float32")
    )
    overlap: bool = option(True, "whether its ring sends while it computes")


@dataclass(frozen=True)
class ScalingConfig(Config):
    what: Ranks = field(default_factory=Ranks)
    model: ModelledMachine = field(default_factory=ModelledMachine)
    how: RankRun = field(default_factory=RankRun)

    @property
    def has_all_cases(self) -> bool:
        return (self.what, self.model) == (Ranks(), ModelledMachine())

    def problem_and_ranks(self) -> tuple[Problem, RankOptions]:
        """The loss to measure, and how; ValueError for unordered numbers of ranks or one rank."""
        chosen = RANK_SIZES[self.how.preset] | {
            name: value for name, value in vars(self.what).items() if value is not None
        }
        world_sizes = whole_numbers("world_sizes", chosen["world_sizes"])
        if sorted(world_sizes) != world_sizes or max(world_sizes) == 1:
            raise ValueError(
                f"world_sizes={chosen['world_sizes']!r}: write ascending numbers, and one above 1 "
                "at least, for the model needs the link between ranks: 1,2."
            )
        samples, labels, width = (chosen[name] for name in ("num_samples", "num_labels", "width"))
        rounds, threads = chosen["rounds"], self.how.threads
        ranks = RankOptions(tuple(world_sizes), rounds, threads, self.what.timeout)
        return Problem(1, samples, labels, width, element_bytes=4), ranks

    def described_machine(self, problem: Problem) -> tuple[Machine, Problem] | None:
        """The machine of the options with the problem in its data type, None without options."""
        given = self.model
        needed = ("matrix_tflops", "giga_exponentials", "memory_gb", "message_us", "link_gb_s")
        tflops, exponentials, memory, message, link = (getattr(given, name) for name in needed)
        missing = [name for name in needed if getattr(given, name) is None]
        if given == ModelledMachine(memory_budget_gb=given.memory_budget_gb):
            return None
        if missing:
            raise ValueError(
                f"Modelling another machine also needs --{missing[0]}: all of {', '.join(needed)}."
            )
        size = 2 if given.dtype == "float16" else 4
        machine = Machine(
            name="the machine of the options",
            flops_per_second=tflops * 1e12,
            exponentials_per_second=exponentials * 1e9,
            memory_bytes=memory * 1e9,
            within=Link(
                (given.node_message_us or message) / 1e6, (given.node_link_gb_s or link) * 1e9
            ),
            between=Link(message / 1e6, link * 1e9),
            ranks_per_node=given.ranks_per_node,
            overlaps_units=True,
            overlaps_messages=given.overlap,
            source="numbers given as options, not measured",
        )
        # GPU kernels work in one tile, in place.
        return machine, replace(problem, element_bytes=size, tile=GPU_TILE, tile_bytes=size)


def sizes(config: BenchConfig) -> dict[str, Any]:
    """Sizes, rounds and seconds as given, else of the preset.

    ValueError if a name is unknown or the device is missing.
    """
    if config.how.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device='cuda': torch {torch.__version__} finds no CUDA device here. Use --device cpu."
        )
    chosen = SIZES[config.how.device, config.how.preset] | {"samples": config.what.samples}
    given = vars(config.what) | vars(config.how)
    chosen |= {name: given[name] for name in chosen if given[name] is not None}
    for name in ("rows", "widths", "classes", "exits", "parameters"):
        chosen[name] = whole_numbers(name, chosen[name])
    chosen["dtypes"] = names_of("dtypes", chosen["dtypes"], DTYPES)
    is_default = config.what.dtypes is None and config.how.device == "cuda"
    if is_default and torch.cuda.get_device_capability() < (8, 0):
        chosen["dtypes"] = tuple(name for name in chosen["dtypes"] if name != "bfloat16")
    chosen["losses"] = names_of("losses", config.what.losses, LOSSES)
    chosen["tasks"] = names_of("tasks", config.what.tasks, TASKS)
    return chosen


def refuse_other_sizes(config: BenchConfig) -> None:
    """Raise ValueError for options of loss and angle that growth would ignore."""
    default = What()
    for name in ("losses", "tasks", "rows", "widths", "classes", "exits", "parameters"):
        if (given := getattr(config.what, name)) != getattr(default, name):
            raise ValueError(
                f"{name}={given!r}: growth has series of its own along each size. Leave it out, or "
                "run bench loss or bench angle."
            )
    if "," in (config.what.dtypes or ""):
        raise ValueError(f"dtypes={config.what.dtypes!r}: growth measures one data type a run.")


def whole_numbers(name: str, text: str) -> list[int]:
    """Different numbers above 0 from a comma-separated list; ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdigit() or int(part) < 1:
            raise ValueError(
                f"{name}={text!r}: {part!r} is not a whole number above 0. Separate numbers by "
                "commas: 1024,4096."
            )
    return list(dict.fromkeys(map(int, parts)))


def names_of(option: str, text: str | None, known: Iterable[str]) -> tuple[str, ...]:
    """Different names of a comma-separated list; ValueError for one that is not known."""
    names = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: there is none named {name!r}.{did_you_mean(name, known)}")
    return names


def output_directory(config: Config) -> Path:
    """Directory of the result file; only a whole full preset goes to the committed results."""
    how = config.how
    if how.output_dir is not None:
        return Path(how.output_dir)
    machine = machine_name(torch.device(how.device if isinstance(how, How) else "cpu"))
    committed = Path(__file__).parent / "results"
    if config.is_whole and how.preset == "full" and os.access(committed, os.W_OK):
        return committed / machine
    return Path("runs") / "bench" / machine
