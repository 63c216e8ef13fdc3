"""Dynamic loss scaling for float16: on the device, or on the host for DeepSpeed."""

from dataclasses import dataclass

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
SMALLEST_SCALE = 2.0**-14
# Good steps after which the scale doubles.
GROWTH_INTERVAL = 2000
# Overflows in a row after which a fixed scale is known to be too large.
MOST_OVERFLOWS = 50
NOT_FINITE = (
    "The gradient is NaN or infinite. A lower learning_rate, or max_grad_norm=1, usually helps."
)


class LossScaler:
    """Halve the loss scale on overflow, double it after `GROWTH_INTERVAL` good steps.

    Nothing is read on the host. torch's GradScaler would also unscale the gradients; here that
    division is part of the pass that combines the two gradients. A scaler that is not enabled
    keeps the scale 1.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale: Tensor | float = 1.0
        if enabled:
            self.scale = torch.tensor(INITIAL_SCALE, device=device)
        self._num_good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflow: Tensor) -> None:
        """Account for one optimizer step; overflow []: whether it was skipped."""
        if isinstance(self.scale, Tensor):
            # The report of the step holds the scale that the step used.
            self.scale = self.scale.clone()
            torch._amp_update_scale_(
                self.scale, self._num_good_steps, overflow.float(), 2.0, 0.5, GROWTH_INTERVAL
            )

    def check(self, scale: float, overflow: bool) -> None:
        """Refuse an overflow that no smaller scale can mend; `scale` is the one of that step.

        Raises:
            FloatingPointError: the gradient is NaN or infinite.
        """
        if overflow and not self.enabled:
            raise FloatingPointError(NOT_FINITE)
        if overflow and scale / 2 < SMALLEST_SCALE:
            raise FloatingPointError(
                f"The gradient overflows float16 even at a loss scale of {scale:g}: it is NaN or "
                "infinite. A lower learning_rate, or bf16, usually helps."
            )

    def state_dict(self) -> dict[str, float]:
        return {"scale": float(self.scale), "num_good_steps": int(self._num_good_steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if isinstance(self.scale, Tensor):
            self.scale = torch.full_like(self.scale, state["scale"])
        self._num_good_steps.fill_(state["num_good_steps"])


@dataclass(frozen=True)
class LossScaleOptions:
    """The "fp16" block of a DeepSpeed configuration; `loss_scale` 0 stands for a dynamic scale."""

    loss_scale: float = 0.0
    initial_scale_power: int = 16
    loss_scale_window: int = GROWTH_INTERVAL
    hysteresis: int = 1
    consecutive_hysteresis: bool = False
    min_loss_scale: float = SMALLEST_SCALE


class DeepSpeedLossScaler:
    """Dynamic loss scaling as DeepSpeed's configuration describes it, or a fixed scale.

    It takes `hysteresis` overflows to lower the scale; those before merely skip their steps. Each
    growth of the scale (each good step, if consecutive_hysteresis) starts that count anew.
    DeepSpeed's own scaler does the same, but its optimizers divide the gradients of the step at
    which the scale grows by the new scale.
    """

    def __init__(self, enabled: bool, options: LossScaleOptions) -> None:
        self.enabled = enabled
        self.options = options
        initial = options.loss_scale or 2.0**options.initial_scale_power
        self.scale = initial if enabled else 1.0
        self.num_good_steps = self.num_overflows = 0
        self.patience = options.hysteresis

    def update(self, overflow: bool) -> None:
        """Account for one optimizer step, taken or skipped because of an overflow.

        Raises:
            FloatingPointError: an overflow at the smallest loss scale, or `MOST_OVERFLOWS` in a row
                at a fixed one.
        """
        options = self.options
        if not self.enabled:
            return
        if options.loss_scale:
            self.num_overflows = self.num_overflows + 1 if overflow else 0
            if self.num_overflows == MOST_OVERFLOWS:
                raise FloatingPointError(
                    f"{MOST_OVERFLOWS} steps in a row have overflowed float16 and changed nothing "
                    f"at the fixed loss_scale={self.scale:g} of deepspeed_config. Lower it, or set "
                    "it to 0, which adapts it."
                )
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
        self.num_good_steps += 1
        grows = self.num_good_steps >= options.loss_scale_window
        if grows:
            self.scale *= 2
            self.num_good_steps = 0
        if grows or options.consecutive_hysteresis:
            self.patience = options.hysteresis

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("scale", "num_good_steps", "patience")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)
        if self.enabled and self.options.loss_scale:
            # deepspeed_config may have been edited since the checkpoint.
            self.scale = self.options.loss_scale
