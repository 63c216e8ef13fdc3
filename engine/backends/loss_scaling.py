"""The loss scale of float16 as a DeepSpeed configuration describes it."""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST_SCALE = 2.0**-14


class LossScaler:
    """Dynamic loss scaling: halve on overflow, double after `growth_interval` good steps.

    torch's GradScaler wants to unscale the gradients itself; here the division by the scale is part
    of the pass that combines the two gradients, so only the bookkeeping is left. A scaler that is
    not enabled keeps the scale 1.
    """

    def __init__(
        self, enabled: bool, initial_scale: float = 2.0**16, growth_interval: int = 2000
    ) -> None:
        self.enabled = enabled
        self.scale = initial_scale if enabled else 1.0
        self.growth_interval = growth_interval
        self.num_good_steps = 0

    def update(self, overflow: bool) -> None:
        """Account for one optimizer step, taken (no overflow) or skipped."""
        if not self.enabled:
            return
        if overflow:
            self.scale /= 2
            self.num_good_steps = 0
            if self.scale < SMALLEST_SCALE:
                raise FloatingPointError(
                    "The gradient overflows float16 even at a loss scale of "
                    f"{self.scale * 2:g}: it is NaN or infinite. A lower learning_rate, or bf16, "
                    "usually helps."
                )
            return
        self.num_good_steps += 1
        if self.num_good_steps == self.growth_interval:
            self.scale *= 2
            self.num_good_steps = 0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "num_good_steps": self.num_good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]
        self.num_good_steps = int(state["num_good_steps"])


@dataclass(frozen=True)
class LossScaleOptions:
    """The keys of the "fp16" block of the same names; `loss_scale` 0 is a dynamic one."""

    loss_scale: float = 0.0
    initial_scale_power: int = 16
    loss_scale_window: int = 2000
    hysteresis: int = 1
    consecutive_hysteresis: bool = False
    min_loss_scale: float = SMALLEST_SCALE


class DeepSpeedLossScaler(LossScaler):
    """A `LossScaler` with a fixed scale, or one that lowers it after several overflows only.

    `hysteresis` overflows lower the scale, the first ones only skip their steps; each growth
    (each good step, if consecutive) allows them anew. DeepSpeed's own scaler does the same, but
    its optimizers divide the gradients of the step at which the scale grows by the new scale.
    """

    def __init__(self, enabled: bool, options: LossScaleOptions) -> None:
        super().__init__(
            enabled,
            initial_scale=options.loss_scale or 2.0**options.initial_scale_power,
            growth_interval=options.loss_scale_window,
        )
        self.options = options
        self.patience = options.hysteresis

    def update(self, overflow: bool) -> None:
        if not self.enabled:
            return
        options = self.options
        if options.loss_scale:
            return
        if overflow:
            self.num_good_steps = 0
            if self.patience > 1:
                self.patience -= 1
                return
            if self.scale <= options.min_loss_scale:
                raise FloatingPointError(
                    "The gradient overflows float16 even at the smallest loss scale, "
                    f"{self.scale:g} (min_loss_scale). A lower learning_rate, or bf16, usually "
                    "helps."
                )
            self.scale = max(self.scale / 2, options.min_loss_scale)
            return
        if options.consecutive_hysteresis:
            self.patience = options.hysteresis
        previous = self.scale
        super().update(overflow=False)
        if self.scale != previous:
            self.patience = options.hysteresis

    def state_dict(self) -> dict[str, float]:
        return {**super().state_dict(), "patience": self.patience}

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        self.patience = int(state["patience"])
