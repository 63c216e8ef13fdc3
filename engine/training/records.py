"""Records of the steps of a run, made when a step's values have come from the device."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends.interface import Backend, StepReport
from ..config.sections import ObjectiveOptions
from ..objectives.gate import GateDecision
from ..objectives.losses import check_finite
from ..runtime import collectives
from .stages import Stage
from .transfers import PendingValues, Stopwatch

Record = dict[str, Any]


class GateHistory:
    """The angle and the decision of every optimizer step and group, and their summary by epoch."""

    _COLUMNS = ("epochs", "groups", "angles", "dropped", "agreed")

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []

    def add(
        self, epoch: int, group: str, angle: float, dropped: bool, agreed: bool | None = None
    ) -> None:
        """Add the decision of one step for one group of parameters; the angle is in degrees.

        agreed: whether the exact decision was the same, where `gate_scope` is not all.
        """
        self.rows.append((epoch, group, angle, dropped, agreed))

    def summary(self) -> list[dict[str, Any]]:
        """Per epoch and group: steps, share of dropped terms, deciles and median of the angle.

        Angles are in degrees. Where exact decisions were compared, also the number of those steps
        and the share of them with the same decision.
        """
        by_place = defaultdict(list)
        for epoch, group, *decision in self.rows:
            by_place[epoch, group].append(decision)
        summary = []
        for (epoch, group), decisions in by_place.items():
            angles, dropped, agreed = zip(*decisions, strict=True)
            low, median, high = np.percentile(angles, [10, 50, 90])
            row = {
                "epoch": epoch,
                "group": group,
                "steps": len(decisions),
                "dropped_share": float(np.mean(dropped)),
                "angle_p10": float(low),
                "angle_median": float(median),
                "angle_p90": float(high),
            }
            compared = [same for same in agreed if same is not None]
            if compared:
                row |= {
                    "compared_steps": len(compared),
                    "agreement_share": float(np.mean(compared)),
                }
            summary.append(row)
        return summary

    def state_dict(self) -> dict[str, list[Any]]:
        return {name: [row[i] for row in self.rows] for i, name in enumerate(self._COLUMNS)}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        # A checkpoint of an earlier version has no `agreed`.
        absent = [None] * len(state["epochs"])
        columns = (state.get(name, absent) for name in self._COLUMNS)
        self.rows = list(zip(*columns, strict=True))


class StepRecords:
    """Sends the values of each step to the host; checks, keeps and logs them as they arrive.

    Args:
        history: gets the decisions of the gate.
        write: gets the records of the steps that are logged, in their order.
    """

    def __init__(
        self,
        options: ObjectiveOptions,
        device: torch.device,
        history: GateHistory,
        write: Callable[[Record], None],
    ) -> None:
        self.options = options
        self.history = history
        self.write = write
        self.pending = PendingValues(device)

    def send(
        self,
        place: Record,
        backend: Backend,
        report: StepReport,
        not_finite: Sequence[Tensor],
        num_samples: int,
    ) -> None:
        """Send what every step is checked for and what the gate decided.

        Args:
            place: "step", and "gate_epoch", the epoch of the run for `history`.
            not_finite: counts [E] of representations, out of `num_samples`.
        """

        def check(values: Record) -> None:
            step = place["step"]
            check_finite(values["not_finite"], num_samples, step)
            try:
                backend.check(values["loss_scale"], bool(values["skipped"]))
            except FloatingPointError as error:
                raise FloatingPointError(f"Step {step}: {error}") from None
            if "angle" not in values or values["skipped"]:
                return
            columns = (values["active"], values["angle"], values["kept"], _agreed(values))
            for group, active, angle, kept, agreed in zip(backend.groups, *columns, strict=True):
                if active:
                    self.history.add(place["gate_epoch"], group, angle, not kept, agreed)

        values = {
            "not_finite": torch.stack(list(not_finite)).sum(0),
            "skipped": report.skipped,
            "loss_scale": report.loss_scale,
            **_decision_values(report.decision),
        }
        self.pending.send(values, check)

    def log(
        self,
        place: Record,
        stage: Stage,
        epoch: int,
        groups: Sequence[str],
        losses: Tensor,
        learned: Mapping[str, Tensor],
        report: StepReport,
        num_texts: int,
        stopwatch: Stopwatch,
    ) -> None:
        """Send what the record of one step has; losses are sums over the exits.

        Args:
            place: begins the record.
            epoch: of the stage, 1 is the first.
            losses: `ExitLosses.values` of the step [3, E], the part of this process in it.
            learned: name -> value [] of what the objective learned, as the step used it.
        """
        main, cross_entropy, auxiliary = collectives.total(losses)  # [E] each
        shown: Record = {}
        loss = main
        if self.options.objective != "ce":
            weight = torch.full_like(main, self.options.aux_weight)
            if report.decision is not None:
                used = weight * stage.kept_exits(epoch, report.decision.kept).to(weight)
                skipped = torch.as_tensor(report.skipped, device=weight.device)
                weight = torch.where(skipped, weight, used)
            loss = (1 - weight) * main + weight * auxiliary
            shown = {"loss_aux": auxiliary.sum(), "aux_weight": weight.mean(), **learned}
        shown |= {
            "loss": loss.sum(),
            "loss_ce": cross_entropy.sum(),
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "loss_scale": report.loss_scale,
            "skipped": report.skipped,
        }
        stopwatch.stop()

        def write(values: Record) -> None:
            record = {**place, **_angles(groups, values), **{name: values[name] for name in shown}}
            record["skipped"] = bool(values["skipped"])
            record["samples_per_second"] = round(num_texts / stopwatch.seconds(), 2)
            # JSON has no NaN: an overflow leaves no angle and no norm.
            for name, value in record.items():
                if isinstance(value, float) and not math.isfinite(value):
                    record[name] = None
            self.write(record)

        self.pending.send(shown | _decision_values(report.decision), write)


def _decision_values(decision: GateDecision | None) -> Record:
    """Those parts of a decision that are recorded."""
    names = ("active", "angle", "kept", "exact_angle", "agrees")
    values = {name: getattr(decision, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _agreed(values: Record) -> list[bool | None]:
    """True for each group with the same exact decision; None without an exact decision."""
    if "agrees" not in values:
        return [None] * len(values["kept"])
    # In float16 a gradient that this step did not use may be infinite.
    pairs = zip(values["agrees"], values["exact_angle"], strict=True)
    return [bool(same) if math.isfinite(exact) else None for same, exact in pairs]


def _angles(groups: Sequence[str], values: Record) -> Record:
    """The angle of the only group, or of each group that a gradient reached, and the exact one."""
    if "angle" not in values:
        return {}
    if list(groups) == ["model"]:
        angles = {"angle_degrees": values["angle"][0]}
    else:
        rows = zip(groups, values["active"], values["angle"], strict=True)
        angles = {f"angle_degrees {name}": angle for name, active, angle in rows if active}
    if "exact_angle" not in values:
        return angles
    exact = {"angle_degrees_all": values["exact_angle"][0], "gate_agrees": _agreed(values)[0]}
    return angles | exact
