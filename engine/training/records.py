"""Records of a run: decisions of the gate, comparisons between ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..objectives.gate import GateDecision


class GateHistory:
    """The angle and the decision of every optimizer step and group, and their summary by epoch."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.groups: list[str] = []
        self.angles: list[float] = []
        self.dropped: list[bool] = []
        # None where the exact decision was not looked for.
        self.agreed: list[bool | None] = []

    def add(
        self, epoch: int, group: str, angle: float, dropped: bool, agreed: bool | None = None
    ) -> None:
        """One step: epoch (1 = first), the group of parameters, angle in degrees, decision.

        agreed: whether the exact decision was the same, where `gate_scope` is not all.
        """
        self.epochs.append(epoch)
        self.groups.append(group)
        self.angles.append(angle)
        self.dropped.append(dropped)
        self.agreed.append(agreed)

    def summary(self) -> list[dict[str, Any]]:
        """By epoch and group: steps, share of dropped ones, deciles and median angle (degrees).

        Where the exact decision was looked for also in how many steps, and the share of them in
        which it was the same.
        """
        epochs, angles = np.array(self.epochs), np.array(self.angles)
        groups, dropped = np.array(self.groups), np.array(self.dropped)
        rows = []
        for epoch, group in dict.fromkeys(zip(self.epochs, self.groups, strict=True)):
            here = (epochs == epoch) & (groups == group)
            low, median, high = np.percentile(angles[here], [10, 50, 90])
            compared = [self.agreed[place] for place in np.flatnonzero(here)]
            agreed = [same for same in compared if same is not None]
            rows.append(
                {
                    "epoch": epoch,
                    "group": group,
                    "steps": int(here.sum()),
                    "dropped_share": float(dropped[here].mean()),
                    "angle_p10": float(low),
                    "angle_median": float(median),
                    "angle_p90": float(high),
                }
            )
            if agreed:
                rows[-1] |= {
                    "compared_steps": len(agreed),
                    "agreement_share": np.mean(agreed).item(),
                }
        return rows

    def state_dict(self) -> dict[str, list[Any]]:
        return {name: list(values) for name, values in vars(self).items()}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        for name in vars(self):
            # A checkpoint of a version before has no `agreed`.
            setattr(self, name, list(state.get(name, [None] * len(state["epochs"]))))


def agreements(decision: GateDecision) -> list[bool | None]:
    """Whether the exact decision was the same, by group; None where there was none."""
    if decision.agrees is None or decision.exact_angle is None:
        return [None] * len(decision.kept)
    # In float16 a gradient may be infinite that this step did not use.
    known = decision.exact_angle.isfinite().tolist()
    return [
        same if seen else None for same, seen in zip(decision.agrees.tolist(), known, strict=True)
    ]


def comparison(decision: GateDecision) -> dict[str, Any]:
    """The exact angle, and whether it decides alike, where a step looked for them."""
    if decision.exact_angle is None:
        return {}
    return {
        "angle_degrees_all": decision.exact_angle[0].item(),
        "gate_agrees": agreements(decision)[0],
    }
