"""Where an engine keeps its reduced gradients: which class knows its ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .gradients import ZeroGradients, check_version
from .offload import OffloadedStage1, OffloadedStage2, OffloadedStage3
from .stages import Stage0, Stage1, Stage2, Stage3

_STAGES: Mapping[int, type[ZeroGradients]] = {0: Stage0, 1: Stage1, 2: Stage2, 3: Stage3}
_OFFLOADED: Mapping[int, type[ZeroGradients]] = {
    1: OffloadedStage1,
    2: OffloadedStage2,
    3: OffloadedStage3,
}


def zero_gradients(engine: Any, num_kinds: int, *, offloads: bool = False) -> ZeroGradients:
    """The gradients of an engine, as its ZeRO stage leaves them.

    offloads: whether its optimizer lies in host memory.
    """
    check_version()
    stages = _OFFLOADED if offloads else _STAGES
    return stages[int(engine.zero_optimization_stage())](engine, num_kinds)
