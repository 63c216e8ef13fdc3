"""Time, memory and parts of a training step, float32 on the CPU.

    python -m fusedacl.benchmarks.suites.step.suite [--quick] [--providers fusedacl_ce,fusedacl_acl]

Our trainer (cross-entropy, CE+SCL, ACL with each scope of the gate, under DeepSpeed with one
process) beside the Hugging Face Trainer and a loop written by hand, on the same model, weights,
batches and optimizer. Every text has the same number of tokens. A sample is the time from the end
of one step to the end of the next, batching included; the contestants take turns of several steps,
whose first ones are left out. Before anything is timed their losses must agree, without dropout:
those of all steps where two train alike, else those of the first step. Where our step's time goes
is profiled in a turn of its own.
"""

import argparse
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from ....engine.runtime import processes
from ....engine.runtime.plots import require_matplotlib
from ....engine.runtime.text import text_table
from ....engine.training.profiling import WARM_UP
from ...floors.matrix_products import PRODUCTS, add_floors, flops_of, product_turn
from ...measuring.clock import interleave_samples, ratio, seconds
from ...measuring.environment import Result, machine_name
from ...measuring.result_file import ResultFile, default_directory
from ...pages.step_figure import draw
from ..suite import check_names
from .memory import peaks
from .names import (
    ACL,
    BARS,
    CACHED,
    CACHED_WORDS,
    CE,
    HUGGING_FACE,
    ONE_CHUNK,
    ONE_SHOT,
    TWO_BACKWARD,
    WORDS,
)
from .trainers import OURS, Case, Contestant, Files, Ours, contestant, obstacle

# Of the losses, relative. Adam makes rounding grow with the steps.
MAX_ERROR = 1e-4
# The Hugging Face Trainer logs four decimals.
MAX_LOGGED_ERROR = 1e-3
CHECK_STEPS = 3
# Of a turn: memory is new then, and what the one before has left goes back to the system.
WARM_UP_STEPS = 2
# The second one's losses tell of the first one's gradients.
CACHED_CHECK_STEPS = 2
# Provider -> the one that trains alike.
ALIKE = {
    HUGGING_FACE: CE,
    "deepspeed_ce": CE,
    TWO_BACKWARD: ACL,
    "deepspeed_acl": ACL,
}
CACHED_BATCH = "cached"
CASES = ("minilm", "bert-base", CACHED_BATCH)
MAX_CACHED_MEMORY = 1.3
MAX_CACHED_TIME = 1.45


@dataclass(frozen=True)
class Turns:
    """How a case is measured: rounds of turns, timed and profiled steps of a turn, memory.

    providers: names, empty for all. has_bars: whether the promises are for a case of this size.
    """

    rounds: int
    steps: int
    profiled: int
    memory: bool
    providers: tuple[str, ...] = ()
    has_bars: bool = True


@dataclass(frozen=True)
class Chunks:
    """A contrastive batch that is cached, in chunks of `case.batch` texts."""

    case: Case
    number: int
    turns: Turns

    @property
    def words(self) -> str:
        return f"contrastive batch of {self.number} chunks: {self.case.words} a chunk"


@dataclass(frozen=True)
class Preset:
    cases: tuple[tuple[Case, Turns], ...]
    cached: Chunks


# On the large model, whose steps take seconds.
LARGE = (
    CE,
    HUGGING_FACE,
    "fusedacl_acl_ungated",
    ACL,
    "fusedacl_acl_top2",
    "fusedacl_acl_head",
    TWO_BACKWARD,
)
QUICK = (CE, HUGGING_FACE, ACL, "fusedacl_acl_head")
PRESETS = {
    "full": Preset(
        (
            (Case("minilm", 32, 48), Turns(rounds=5, steps=4, profiled=4, memory=True)),
            (
                Case("bert-base", 8, 64),
                Turns(rounds=5, steps=3, profiled=2, memory=True, providers=LARGE),
            ),
        ),
        Chunks(Case("minilm", 32, 64), 32, Turns(rounds=1, steps=2, profiled=0, memory=True)),
    ),
    "quick": Preset(
        (
            (
                Case("minilm", 8, 24, num_layers=3),
                Turns(rounds=1, steps=2, profiled=1, memory=False, providers=QUICK, has_bars=False),
            ),
        ),
        Chunks(
            Case("minilm", 4, 24, num_layers=3),
            4,
            Turns(rounds=1, steps=2, profiled=0, memory=False, has_bars=False),
        ),
    ),
}


@dataclass(frozen=True)
class Options:
    """
    preset: one of PRESETS, or what it holds. providers: names, empty for all; without `ACL` among
        them the cached batch is left out.
    cases: of CASES, empty for all. Some of them leave a file with their names in its own.
    output_dir: where step.json and the figure go, the file after every case; None: nowhere.
    """

    preset: str | Preset = "full"
    providers: tuple[str, ...] = ()
    threads: int = 2
    output_dir: Path | None = None
    cases: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """Of the files that it leaves."""
        return "_".join(("step", *self.cases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, few steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--providers", default="", help=f"of {', '.join(WORDS)} (default: all)")
    parser.add_argument("--cases", default="", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--output_dir", type=Path, help="where step.json and the figure go")
    arguments = parser.parse_args()
    preset = "quick" if arguments.quick else "full"
    # Some providers must not take the place of all in a committed file.
    whole = "custom" if arguments.providers else preset
    options = Options(
        preset,
        tuple(name for name in arguments.providers.split(",") if name),
        arguments.threads,
        arguments.output_dir or default_directory(machine_name(), whole),
        tuple(name for name in arguments.cases.split(",") if name),
    )
    try:
        run(options)
    except ValueError as error:
        parser.error(str(error))
    finally:
        processes.leave()


def run(options: Options) -> Result:
    """All cases; the result has schema 1 (`result`), with "bars" in every case.

    Raises:
        ValueError: an unknown provider, or no matplotlib for the figure.
        SystemExit: trainers that should train alike do not.
    """
    check_names(options.providers, WORDS)
    check_names(options.cases, CASES, "cases")
    if options.output_dir is not None:
        require_matplotlib()
    torch.set_num_threads(options.threads)
    if isinstance(options.preset, Preset):
        name, preset = "custom", options.preset
    else:
        name, preset = options.preset, PRESETS[options.preset]
    directory = options.output_dir or Path()
    file = ResultFile(directory / f"{options.stem}.json", "step", name, machine=machine_name())
    cases = file.result["cases"] = []
    wanted = options.providers or tuple(WORDS)
    with tempfile.TemporaryDirectory() as temporary, quiet():
        files = Files(Path(temporary))
        for case, turns in preset.cases:
            names = [name for name in wanted if name in (turns.providers or WORDS)]
            if not names or case.model not in (options.cases or [case.model]):
                continue
            cases.append(measure(case, turns, names, files, options.threads))
            print(text(cases[-1]))
            if options.output_dir is not None:
                file.save()
        if ACL in wanted and CACHED_BATCH in (options.cases or [CACHED_BATCH]):
            cases.append(measure_cached(preset.cached, files, options.threads))
            print(text(cases[-1]))
    if options.output_dir is not None:
        file.result["figures"] = draw(file.result, options.output_dir, options.stem)
        file.save()
        print(f"written: {', '.join((str(file.path), *file.result['figures']))}")
    return file.result


@contextmanager
def quiet() -> Iterator[None]:
    """Dozens of runs say the same of the same texts."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("fusedacl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def measure(case: Case, turns: Turns, names: Iterable[str], files: Files, threads: int) -> Result:
    """One case: who agrees, then times in turns, parts and peaks of memory."""
    left_out = {name: why for name in names if (why := obstacle(name)) is not None}
    running = {
        name: contestant(name, case, files)
        for name in WORDS
        if name in names and name not in left_out
    }
    losses, flops, wrong = check(case, running, files)
    for name, why in wrong.items():
        left_out[name] = why
        del running[name]
    times, rate = timed(running, flops, case.width, turns, skip=WARM_UP_STEPS)
    for name, one in tqdm(running.items(), desc="profile", leave=False):
        if isinstance(one, Ours) and turns.profiled:
            one.turn(WARM_UP + turns.profiled, profile=turns.profiled)
            times[name]["shares"] = one.shares
    if turns.memory:
        makers = {name: partial(contestant, name, case, files) for name in running}
        _add_peaks(times, peaks(makers, threads))
    return {
        "case": asdict(case),
        "words": case.words,
        "losses": losses,
        **rate,
        "providers": times,
        "left_out": left_out,
        "bars": [
            bar(what, ratio(times, slower, faster), most)
            for what, slower, faster, most in BARS
            if turns.has_bars and slower in times and faster in times
        ],
    }


def timed(
    running: Mapping[str, Contestant], flops: Mapping[str, int], width: int, turns: Turns, skip: int
) -> tuple[dict[str, Result], Result]:
    """Times by contestant, with the floors of their matrix products; and the products' rate."""
    num_steps = turns.steps + skip
    product = product_turn(width)
    times = interleave_samples(
        {
            **{name: partial(one.turn, num_steps) for name, one in running.items()},
            PRODUCTS: lambda: [seconds(product) for _ in range(num_steps)],
        },
        rounds=turns.rounds,
        skip=skip,
    )
    rate = add_floors(times, {name: flops[name] for name in running}, width)
    return times, rate


def check(
    case: Case, contestants: Mapping[str, Contestant], files: Files
) -> tuple[dict[str, list[tuple[float, float | None]]], dict[str, int], dict[str, str]]:
    """The losses of some steps, FLOPs of a step, and who of the others' may not be timed.

    Raises:
        SystemExit: one of ours is wrong.
    """
    # What they are compared with, wanted or not.
    needed = dict.fromkeys([*contestants, CE, *(ALIKE[n] for n in contestants if n in ALIKE)])
    if any(name not in (CE, HUGGING_FACE) for name in contestants):
        needed[ACL] = None
    losses, flops = {}, {}
    for name in tqdm(needed, desc="check", leave=False):
        one = contestants.get(name) or contestant(name, case, files)
        flops[name] = flops_of(
            partial(one.turn, CHECK_STEPS, dropout=0.0, logging_steps=1), CHECK_STEPS
        )
        losses[name] = one.losses
    wrong = {}
    for name in contestants:
        alike = name in ALIKE
        pairs = list(zip(losses[name], losses[ALIKE.get(name, CE)], strict=True))
        error = max(_relative(found[0], exact[0]) for found, exact in pairs[: None if alike else 1])
        limit = MAX_LOGGED_ERROR if name == HUGGING_FACE else MAX_ERROR
        if losses[name][0][1] is not None and name != "fusedacl_scl":
            pairs = list(zip(losses[name], losses[ACL], strict=True))[: None if alike else 1]
            error = max(error, *(_relative(found[1], exact[1]) for found, exact in pairs))
        if not error <= limit:
            why = f"its losses differ by {error:.1e} (relative): not timed"
            if name in OURS:
                raise SystemExit(f"{case.words}, {name}: {why}")
            wrong[name] = why
    return losses, flops, wrong


def _relative(found: float | None, exact: float | None) -> float:
    assert found is not None and exact is not None
    return abs(found - exact) / abs(exact)


def measure_cached(chunks: Chunks, files: Files, threads: int) -> Result:
    """A cached batch beside one chunk's step, and beside the step that takes it in one shot."""
    case, number, turns = chunks.case, chunks.number, chunks.turns
    whole = case.batch * number
    makers = {
        ONE_CHUNK: partial(contestant, ACL, case, files),
        CACHED: partial(
            contestant,
            ACL,
            case,
            files,
            gradient_accumulation_steps=number,
            contrastive_batch_size=whole,
        ),
        ONE_SHOT: partial(contestant, ACL, case, files, per_device_train_batch_size=whole),
    }
    running = {name: make() for name, make in makers.items()}
    flops = {
        name: flops_of(
            partial(one.turn, CACHED_CHECK_STEPS, dropout=0.0, logging_steps=1), CACHED_CHECK_STEPS
        )
        for name, one in running.items()
    }
    pairs = zip(running[CACHED].losses, running[ONE_SHOT].losses, strict=True)
    error = max(
        _relative(a, b) for found, exact in pairs for a, b in zip(found, exact, strict=True)
    )
    if not error <= MAX_ERROR:
        raise SystemExit(f"{chunks.words}: the losses differ by {error:.1e} (relative): not timed")
    times, rate = timed(running, flops, case.width, turns, skip=1)
    result: Result = {
        "case": {**asdict(case), "chunks": number},
        "words": chunks.words,
        **rate,
        "providers": times,
        "left_out": {},
        "bars": [
            bar("cached over one shot, time", ratio(times, CACHED, ONE_SHOT), MAX_CACHED_TIME)
        ],
    }
    if turns.memory:
        _add_peaks(times, peaks(makers, threads))
        cached, one_chunk = (times[name].get("peak_bytes") for name in (CACHED, ONE_CHUNK))
        if cached is not None and one_chunk is not None:
            what = "cached over one chunk, peak memory"
            result["bars"].append(bar(what, cached / one_chunk, MAX_CACHED_MEMORY))
    if not turns.has_bars:
        result["bars"] = []
    return result


def _add_peaks(times: dict[str, Result], found: Mapping[str, int | str | None]) -> None:
    for name, peak in found.items():
        key = "peak_error" if isinstance(peak, str) else "peak_bytes"
        times[name][key] = peak


def bar(what: str, value: float, most: float) -> Result:
    """A ratio beside what it should be at most: reported, not enforced."""
    return {"what": what, "value": float(value), "at_most": most, "met": bool(value <= most)}


def text(case: Result) -> str:
    """A case as a table, its bars, and who is not in it."""
    times = case["providers"]
    base = times.get(CE) or times[next(iter(times))]
    rows = []
    for name, row in times.items():
        peak = row.get("peak_bytes")
        rows.append(
            [
                (WORDS | CACHED_WORDS)[name],
                f"{row['p50_ms']:.0f}",
                f"{row['p20_ms']:.0f} to {row['p80_ms']:.0f}",
                f"{row['p50_ms'] / base['p50_ms']:.2f}",
                f"{row['over_floor']:.2f}",
                "-" if peak is None else f"{peak / 2**20:.0f}",
            ]
        )
    header = [case["words"], "ms", "20th to 80th", "relative", "x floor", "peak MiB"]
    lines = [text_table(header, rows)]
    lines += [
        f"{b['what']}: {b['value']:.2f} (at most {b['at_most']}: {'yes' if b['met'] else 'no'})"
        for b in case["bars"]
    ]
    lines += [f"left out: {WORDS[name]}: {why}" for name, why in case["left_out"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
