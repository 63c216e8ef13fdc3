"""The loss scale of float16 as a DeepSpeed configuration describes it."""

from __future__ import annotations

from dataclasses import dataclass

from .precision import SMALLEST_SCALE, LossScaler


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
