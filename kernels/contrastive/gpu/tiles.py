"""Tile shapes of the kernels of `pair_sums`: shipped, or measured on this GPU by `tuning`."""

from __future__ import annotations

import functools
import json
import logging
import operator
import os
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...support.machine import assume_constant_result

# Rows are padded to a multiple of every block, so that blocks are loaded without a mask.
PADDED_ROWS = 256
# Up to this width a program holds the gradient of its rows in registers.
ONE_CHUNK = 256
MAX_WIDTH = 1024
# The smallest exponential, exp(-2 / temperature), stays a normal float32 down to here.
MIN_TEMPERATURE = 0.023


def float32_obstacle(dtype: torch.dtype, temperature: float) -> str | None:
    """Return why a loss cannot be computed in float32, or None."""
    if dtype == torch.float64:
        return (
            "it computes in float32 and the embeddings are float64 (impl='tiled' or "
            "impl='reference' computes in float64)"
        )
    if temperature < MIN_TEMPERATURE:
        return (
            f"temperature {temperature} is below {MIN_TEMPERATURE}, where float32 exponentials "
            "leave their range (impl='tiled' goes down to 1 / 690, impl='reference' takes any)"
        )
    return None


@dataclass(frozen=True)
class Tile:
    """Launch parameters of one kernel.

    rows, columns: size of the tile of pairs that a program holds; they divide PADDED_ROWS.
    chunk: columns of z in one matrix product of similarities; divides the padded width.
    output: columns of the gradient that a program holds (0 in the forward pass). Each additional
        chunk of the output computes the similarities once more.
    """

    rows: int
    columns: int
    chunk: int
    output: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Blocks:
    """Tiles of both passes."""

    forward: Tile
    backward: Tile


def shipped(capability: int, dtype: torch.dtype, width: int) -> Blocks:
    """Return the tiles for unit rows of this dtype (float16, float32) and padded width.

    Chosen by the compiled kernels' resources and by counts of their work, not by timing, for which
    there is `tuning`: no spills; then as many rows as registers hold, because every block of rows
    reads all columns; then a third buffer where one program fills a multiprocessor and would wait
    for its loads. Compute capabilities 8.6, 8.9 and 12.x have 99 KiB of shared memory per program,
    8.0 has 163, 9.0 has 227.
    """
    hopper = 90 <= capability < 100
    little_memory = capability in (86, 89) or capability >= 120
    if dtype == torch.float32:
        # A product made of three tf32 products holds three times the operands: smaller chunks.
        chunk, output = min(width, 32), min(width, 128)
        wide = width > 64
        columns = 16 if wide and capability >= 90 else 32
        num_warps = 8 if capability >= 100 or (wide and capability < 90) else 4
        return Blocks(Tile(128, 64, chunk, 0, 8, 2), Tile(64, columns, chunk, output, num_warps, 2))
    if width > ONE_CHUNK:
        # Similarities are computed width / 256 times, for width 768 three times: twice the products
        # of a backward pass that could hold the whole width.
        forward = Tile(128, 64, 64, 0, 4, 3) if capability >= 100 else Tile(128, 128, 64, 0, 8, 2)
        return Blocks(forward, Tile(64, 64, 64, ONE_CHUNK, 8, 2))
    # From 9.0 on the matrix unit takes 64 rows at a time from each group of four warps, and is so
    # fast that it needs the rows of two groups for every column that it reads.
    rows = 128 if capability >= 90 and not (little_memory and width == 256) else 64
    if width == 256:
        num_warps = 4 if capability >= 100 else 8
        stages = 3 if capability == 80 or hopper else 2
        forward = Tile(256 if hopper else 128, 64, 256, 0, num_warps, stages)
        return Blocks(forward, Tile(rows, 64, 256, 256, 8, stages))
    # Below 9.0 four warps of 32 rows each: eight of 16 read every column twice as often.
    few_warps = 4 if capability < 90 else 8
    if width == 128:
        forward = Tile(256 if hopper else 128, 64, 128, 0, few_warps, 2 if little_memory else 3)
        return Blocks(forward, Tile(rows, 64, 128, 128, rows // 16, 3 if hopper else 2))
    forward = Tile(128, 64, width, 0, few_warps, 3)
    return Blocks(forward, Tile(128, 64, width, width, few_warps, 3))


logger = logging.getLogger(__name__)

SCHEMA = 1
# The entry of the file that says which implementation of the loss is faster.
CHOICE = "contrastive_loss"
IMPLEMENTATIONS = ("supcon_fused", "tiled")
PADDED_WIDTHS = (32, 64, 128, 256, 512, 768, 1024)


def cache_file() -> Path:
    """Return $FUSEDACL_CACHE/tuning.json, by default in the user's cache directory."""
    folder = os.environ.get("FUSEDACL_CACHE")
    if folder:
        return Path(folder, "tuning.json")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "fusedacl" / "tuning.json"


@functools.cache
def tuned(kernel: str, device: torch.device, dtype: torch.dtype, width: int) -> Tile | None:
    """Return the tile measured on this GPU with these versions for a padded width, or None."""
    if device.type != "cuda":
        return None
    found = entries().get(entry_name(kernel, device, dtype, width))
    if found is None:
        return None
    try:
        return Tile(**{name: operator.index(number) for name, number in found["tile"].items()})
    except (AttributeError, KeyError, TypeError):
        names = ", ".join(field.name for field in fields(Tile))
        warn_about(cache_file(), f"its tile of {kernel} does not give {names}")
        return None


@assume_constant_result
def measured_choices(
    device: torch.device, dtype: torch.dtype
) -> tuple[tuple[int, str | None], ...]:
    """Return each padded width and the implementation that was faster on this GPU, if it is known.

    dtype: of the unit rows. The implementations are "supcon_fused" and "tiled".
    """
    return read_choices(device, dtype)


@functools.cache
def read_choices(device: torch.device, dtype: torch.dtype) -> tuple[tuple[int, str | None], ...]:
    found: dict[int, str | None] = dict.fromkeys(PADDED_WIDTHS)
    for width in PADDED_WIDTHS if device.type == "cuda" and entries() else ():
        entry = entries().get(entry_name(CHOICE, device, dtype, width))
        if entry is None:
            continue
        if entry.get("implementation") in IMPLEMENTATIONS:
            found[width] = entry["implementation"]
        else:
            names = " or ".join(IMPLEMENTATIONS)
            warn_about(cache_file(), f"its choice for width {width} is not {names}")
    return tuple(found.items())


def entry_name(kernel: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    import triton

    try:
        own = version("fusedacl")
    except PackageNotFoundError:
        own = "unknown"
    where = (torch.cuda.get_device_name(device), f"triton {triton.__version__}", f"fusedacl {own}")
    return " | ".join((kernel, str(dtype).removeprefix("torch."), f"width {width}", *where))


@functools.cache
def entries() -> dict[str, dict[str, Any]]:
    """Return the entries of the cache file, read once."""
    return read(cache_file())


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a file by name; none, with a warning, if the file is not valid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warn_about(path, str(error))
        return {}
    if isinstance(content, dict) and content.get("schema") == SCHEMA:
        found = content.get("entries")
        if isinstance(found, dict) and all(isinstance(entry, dict) for entry in found.values()):
            return found
    warn_about(path, f"it has no entries by name in schema {SCHEMA}")
    return {}


def warn_about(path: Path, reason: str) -> None:
    logger.warning(
        "%s is ignored, and the shipped tiles are used: %s. Remove it, or measure again with "
        "python -m fusedacl.kernels.tuning",
        path, reason,
    )  # fmt: skip
