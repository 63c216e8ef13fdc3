"""Peak memory of a training step: what it raises a process's resident memory by, on the CPU.

A child process takes the steps, so that nothing of the parent's counts. The mark is reset (Linux:
/proc/self/clear_refs) after steps that have made the optimizer's state: weights and state do not
count, gradients and activations do.
"""

import ctypes
import multiprocessing
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from ....engine.runtime import processes
from ...measuring.memory import M_MMAP_THRESHOLD, _status_bytes
from .trainers import Contestant

WARM_UP = 2
# One contestant is not waited for longer than this.
CHILD_SECONDS = 900.0


def peaks(
    makers: Mapping[str, Callable[[], Contestant]], threads: int
) -> dict[str, int | str | None]:
    """Bytes by contestant; a text where its process failed, None where the system does not tell.

    makers: name -> what makes the contestant, in another process.
    """
    if not Path("/proc/self/clear_refs").exists():
        return dict.fromkeys(makers)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, dict(makers), threads))
    process.start()
    sender.close()
    found: dict[str, int | str | None] = {}
    try:
        for name in makers:
            if not receiver.poll(CHILD_SECONDS):
                found[name] = f"no answer within {CHILD_SECONDS:g} seconds"
                break
            found[name] = receiver.recv()
        else:
            # It leaves by itself, so that Python finds nothing to clean up after it.
            process.join(CHILD_SECONDS)
    except EOFError:
        found[name] = "the process that measures memory ended without an answer"
    finally:
        process.kill()
        process.join()
    return {name: found.get(name) for name in makers}


def _serve(
    sender: Connection, makers: Mapping[str, Callable[[], Contestant]], threads: int
) -> None:
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # What is freed goes back to the system at once.
        libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    for make in makers.values():
        try:
            sender.send(_peak(make(), libc))
        except Exception as error:
            # Named beside the times of this one; the others go on.
            sender.send(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    processes.leave()


def _peak(contestant: Contestant, libc: Any) -> int:
    marks: dict[str, int] = {}
    contestant.turn(WARM_UP + 1, after_step=partial(_mark, marks, libc))
    return marks["peak"] - marks["before"]


def _mark(marks: dict[str, int], libc: Any, step: int) -> None:
    if step == WARM_UP:
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        marks["before"] = _status_bytes("VmRSS")
    if step == WARM_UP + 1:
        marks["peak"] = _status_bytes("VmHWM")
