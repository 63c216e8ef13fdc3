"""Hidden states of a frozen backbone on disk, read instead of running the backbone again.

They are one float16 array [tokens, layers, H] in a memory-mapped file, so that the states of a text
are one contiguous read. For linear exits only the state that they read is kept, of the first token
or the mean.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..data.batching import EncodedSplit, evaluation_batches
from ..model.multi_exit import MultiExitForSequenceClassification
from ..model.saved import weights_hash
from ..runtime import collectives, processes
from ..runtime.device import autocast
from ..runtime.files import write_json
from ..runtime.lock import DirectoryLock
from .transfers import to_device

logger = logging.getLogger("fusedacl")

STATES_FILE = "states.float16"
META_FILE = "meta.json"
# Errors of a disk that is full, and of a file system that cannot reserve room.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL)


class FeatureCache:
    """States of some exits' layers for every text of a split; computed if they are not on disk.

    Args:
        directory: holds this cache alone; created if it does not exist.
        positions: exits, by their positions in `exit_layers`, whose layers are kept.
        batch_size, pad_token_id, dtype: for the pass of the backbone over the split.
        replaces_weights: write a cache anew that differs in the weights alone, in place of refusing
            it.

    Raises:
        ValueError: the directory holds the states of other texts, another backbone or other layers,
            or the disk has no room for them; room is reserved before anything is written.
    """

    def __init__(
        self,
        directory: Path,
        model: MultiExitForSequenceClassification,
        encoded: EncodedSplit,
        positions: list[int],
        *,
        batch_size: int,
        pad_token_id: int,
        dtype: torch.dtype = torch.float32,
        progress: bool = False,
        replaces_weights: bool = False,
    ) -> None:
        self._one_state = model.config.exit_head == "linear"
        self.directory = directory
        self.offsets = _offsets(model, encoded)
        backbone = weights_hash(model.backbone.state_dict())
        meta = {**_description(model, encoded, positions, dtype), "weights": backbone}
        self.shape = tuple(meta["shape"])
        self.num_bytes = _num_bytes(meta)
        batches = evaluation_batches(
            encoded,
            batch_size,
            pad_token_id,
            device=model.device,
            # Each process of the run writes a part.
            part=slice(processes.rank(), None, processes.world_size()),
            progress="features" if progress else None,
        )
        with contextlib.ExitStack() as held:
            if collectives.from_first(lambda: self._is_there_alone(meta, held, replaces_weights)):
                logger.info("Feature cache: reading %s.", directory)
            else:
                collectives.from_first(self._make)
                collectives.together(lambda: self._write(model, positions, dtype, batches))
                collectives.from_first(lambda: write_json(directory / META_FILE, meta))
            # Behind the lock, because the next run may put a file of its own in this one's place.
            self.states = collectives.together(lambda: self._open("r"))

    def _open(self, mode: Literal["r", "r+"]) -> np.memmap:
        file = self.directory / STATES_FILE
        return np.memmap(file, dtype=np.float16, mode=mode, shape=self.shape)

    def _is_there_alone(
        self, meta: dict[str, Any], held: contextlib.ExitStack, replaces_weights: bool
    ) -> bool:
        """Tell if the states are on the disk already, behind a lock that `held` keeps.

        Without it, two runs that both find nothing would overwrite each other's file.
        """
        directory = self.directory
        waiting = f"Feature cache: waiting for the run that writes {directory}."
        held.enter_context(DirectoryLock(directory).held(waiting))
        found = _read_meta(directory)
        if found is None:
            return False
        if replaces_weights and _differences(found, meta) == ["weights"]:
            logger.info("Feature cache: replacing the states of other weights in %s.", directory)
            # Before the states, so that a killed run leaves none that pass for complete.
            (directory / META_FILE).unlink()
            return False
        _refuse_differences(directory, found, meta)
        states = directory / STATES_FILE
        size = states.stat().st_size if states.is_file() else 0
        if size != self.num_bytes:
            raise ValueError(
                f"feature_cache={str(directory)!r} is damaged: {STATES_FILE} has {size} bytes and "
                f"should have {self.num_bytes}. Delete it."
            )
        return True

    def _make(self) -> None:
        """Create the file at its full size, and log that."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / STATES_FILE
        # The file of a killed run takes room that the new one needs.
        file.unlink(missing_ok=True)
        free = shutil.disk_usage(self.directory).free
        logger.info(
            "Feature cache: writing %.2f GB (%d states, %d layers, width %d, float16) to %s.",
            self.num_bytes / 1e9, *self.shape, self.directory,
        )  # fmt: skip
        _check_room(self.directory, self.num_bytes, free)
        try:
            _reserve(file, self.num_bytes)
        except OSError as error:
            file.unlink(missing_ok=True)
            if error.errno not in _NO_ROOM:
                raise
            why = f"the disk has no room: {error.strerror}"
            raise _no_room(self.directory, self.num_bytes, why) from None

    @torch.inference_mode()
    def _write(
        self,
        model: MultiExitForSequenceClassification,
        positions: list[int],
        dtype: torch.dtype,
        batches: Iterable[tuple[np.ndarray, dict[str, Tensor]]],
    ) -> None:
        states = self._open("r+")
        heads = [model.exits.heads[position] for position in positions]
        for indices, batch in batches:
            with autocast(model.device, dtype):
                layers = model.exit_states(**batch, positions=positions)
            if self._one_state:
                mask = batch["attention_mask"]
                layers = [
                    head.text_states(layer, mask)[:, None]
                    for head, layer in zip(heads, layers, strict=True)
                ]
            half = torch.stack(layers, dim=2).half()  # [N, T, L, H]
            if not torch.isfinite(half).all():
                raise ValueError(
                    f"feature_cache={str(self.directory)!r}: this backbone's states are beyond "
                    "float16's 65504, or not finite. Leave feature_cache out."
                )
            stacked = half.cpu().numpy()
            for row, index in enumerate(indices):
                start, stop = self.offsets[index], self.offsets[index + 1]
                states[start:stop] = stacked[row, : stop - start]
        states.flush()

    def batch(
        self, indices: np.ndarray, device: torch.device, dtype: torch.dtype
    ) -> tuple[list[Tensor], Tensor]:
        """States [N, T, H] of each layer, zero where padded, and the mask [N, T].

        dtype: of the exits' weights, which DeepSpeed keeps in half precision.
        """
        starts, stops = self.offsets[indices], self.offsets[indices + 1]
        lengths = stops - starts
        _, num_layers, width = self.shape
        padded = np.zeros((len(indices), lengths.max(), num_layers, width), dtype=np.float16)
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            padded[row, : stop - start] = self.states[start:stop]
        mask = torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64))
        layers = to_device(torch.from_numpy(padded), device).to(dtype).unbind(dim=2)
        return list(layers), to_device(mask, device)


def _reserve(file: Path, num_bytes: int) -> None:
    """Create an empty file of that size, with blocks on the disk if the system can reserve them.

    If a disk fills up without reserved blocks, writing to the mapped file ends the process by a
    signal, without an error message.
    """
    with file.open("wb") as handle:
        # macOS has no such call, and some network file systems do not support it.
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(handle.fileno(), 0, num_bytes)
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:
                    raise
        handle.truncate(num_bytes)


def texts_hash(encoded: EncodedSplit) -> str:
    """SHA-256 of the tokens of a split."""
    digest = hashlib.sha256()
    for array in (encoded.tokens, encoded.offsets, encoded.token_types):
        digest.update(b"none" if array is None else np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check_directory(
    directory: Path,
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    positions: list[int],
    dtype: torch.dtype,
    *,
    replaces_weights: bool = False,
) -> None:
    """Refuse a directory that the second stage could not use, before the first one is trained.

    Args: as for `FeatureCache`.

    Raises:
        ValueError: it is a file, holds the states of other texts or layers, or in other form, or is
            to be written and cannot be, or has no room.
    """
    wanted = _description(model, encoded, positions, dtype)
    # Not `Path.exists`, which raises an error below a directory that may not be searched.
    existing = next(p for p in (directory, *directory.absolute().parents) if os.path.exists(p))
    if not existing.is_dir():
        raise ValueError(
            f"feature_cache={str(directory)!r}: {str(existing)!r} is a file; name a directory."
        )
    found = _read_meta(directory) if existing == directory else None
    if found is not None:
        _refuse_differences(directory, found, wanted)
        if not replaces_weights:
            return
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"feature_cache={str(directory)!r} cannot be written: no files can be created in "
            f"{str(existing)!r}. Name another directory, or leave feature_cache out."
        )
    # In this order, because another run may be making the file that this one will read.
    free = shutil.disk_usage(existing).free
    with contextlib.suppress(FileNotFoundError):
        free += (directory / STATES_FILE).stat().st_size
    _check_room(directory, _num_bytes(wanted), free)


def _num_bytes(description: Mapping[str, Any]) -> int:
    return 2 * math.prod(description["shape"])


def _check_room(directory: Path, num_bytes: int, free: int) -> None:
    if num_bytes > free:
        raise _no_room(directory, num_bytes, f"{free / 1e9:.2f} GB are free")


def _no_room(directory: Path, num_bytes: int, why: str) -> ValueError:
    return ValueError(
        f"feature_cache={str(directory)!r}: {num_bytes / 1e9:.2f} GB are needed and {why}. Name a "
        "directory on a larger disk, or leave feature_cache out."
    )


def _offsets(model: MultiExitForSequenceClassification, encoded: EncodedSplit) -> np.ndarray:
    """The place of each text's first state: linear exits read one state of a text."""
    is_linear = model.config.exit_head == "linear"
    return np.arange(len(encoded) + 1) if is_linear else encoded.offsets


def _description(
    model: MultiExitForSequenceClassification,
    encoded: EncodedSplit,
    positions: list[int],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The content of a cache but for the weights, which the first stage trains."""
    is_mean = model.config.exit_pooling == "mean"
    width = model.config.backbone_config.hidden_size
    return {
        "texts": texts_hash(encoded),
        "layers": [model.exit_layers[position] for position in positions],
        "first_token_only": model.config.exit_head == "linear" and not is_mean,
        # Absent otherwise, as in the files of earlier versions.
        **({"mean_of_tokens": True} if is_mean else {}),
        "backbone_dtype": str(dtype),
        "shape": [int(_offsets(model, encoded)[-1]), len(positions), width],
    }


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [name for name in wanted if found.get(name) != wanted[name]]


def _refuse_differences(
    directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    if differing := _differences(found, wanted):
        raise ValueError(
            f"feature_cache={str(directory)!r} holds the states of another run: "
            f"{', '.join(differing)} differ. Delete it, or name another directory."
        )


def _read_meta(directory: Path) -> dict[str, Any] | None:
    """Read the description of a complete cache: None without a cache, empty if it is damaged."""
    try:
        found = json.loads((directory / META_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
