"""AdamW, PyTorch's or NVIDIA apex's fused one, and its learning-rate schedule."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import get_scheduler

from ..config.sections import OptimizationOptions
from ..config.training import TrainingConfig

APEX_SOURCE = "https://github.com/NVIDIA/apex"


def new_optimizer(
    options: OptimizationOptions,
    parameter_groups: list[dict[str, Any]],
    learning_rate: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    """AdamW over parameter groups, each with its own weight_decay.

    Raises:
        ValueError: apex's FusedAdam cannot run here.
    """
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameter_groups, fused=True, **settings)
    return apex_fused_adam(device)(parameter_groups, adam_w_mode=True, **settings)


def apex_fused_adam(device: torch.device) -> Any:
    """The class apex.optimizers.FusedAdam.

    Raises:
        ValueError: there is no GPU, apex is missing or built without its kernels, or another
            project of that name is installed.
    """
    name = "optimizer=apex_fused_adam"
    remedy = "Use optimizer=adamw (fused in PyTorch), or build NVIDIA apex from " + APEX_SOURCE
    if device.type != "cuda":
        raise ValueError(f"{name} needs a GPU, not {device.type}. {remedy}.")
    if importlib.util.find_spec("apex") is None:
        raise ValueError(f"{name}: apex is not installed. {remedy}.")
    try:
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError:
        raise ValueError(
            f"{name}: the installed package 'apex' is not NVIDIA's; the one of that name on PyPI "
            f"is another project. pip uninstall apex. {remedy}."
        ) from None
    # apex imports without its kernels, and fails at the first step.
    if importlib.util.find_spec("amp_C") is None:
        raise ValueError(
            f"{name}: apex was built without its CUDA extensions (amp_C is missing). {remedy}, "
            "with --cpp_ext --cuda_ext."
        )
    return optimizers.FusedAdam


def decay_groups(parameters: Sequence[Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay; biases and norms, which are vectors, do not."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


class ScheduledAdamW:
    """AdamW under a schedule of its learning rate, over the steps that are taken.

    With `may_skip`, a flag on the device says whether a step is taken. The number of taken steps
    and the learning rate are then kept on the device too, as the host does not know them.

    Args:
        parameters: those that are trained.
        learning_rate: the peak.
        num_steps: the steps of the whole schedule.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        config: TrainingConfig,
        learning_rate: float,
        num_steps: int,
        device: torch.device,
        *,
        may_skip: bool,
    ) -> None:
        groups = decay_groups(parameters, config.optimization.weight_decay)
        self.optimizer = new_optimizer(config.optimization, groups, learning_rate, device)
        self.schedule = new_schedule(self.optimizer, config, num_steps)
        # GradScaler's test for optimizers that take the flag `found_inf` from the device.
        self._takes_flag = may_skip and hasattr(self.optimizer, "_step_supports_amp_scaling")
        if self._takes_flag:
            factor = self.schedule.lr_lambdas[0]
            rates = [learning_rate * factor(step) for step in range(num_steps + 1)]
            self._rates = torch.tensor(rates, dtype=torch.float64, device=device)
            self._num_taken = torch.zeros(1, dtype=torch.int64, device=device)
            self._set_rate()

    def _set_rate(self) -> None:
        self._rate = self._rates.index_select(0, self._num_taken).squeeze(0)
        # The kernel for CUDA wants float32; that for the CPU reads any precision.
        rate = self._rate.float() if self._rate.is_cuda else self._rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @property
    def learning_rate(self) -> Tensor | float:
        """The rate of the next step."""
        return self._rate if self._takes_flag else self.schedule.get_last_lr()[0]

    @property
    def num_taken(self) -> int:
        """Steps that were taken; waits for the device."""
        return int(self._num_taken) if self._takes_flag else self.schedule.last_epoch

    def step(self, skip: Tensor | None = None) -> None:
        """Update the parameters and the rate, and free the gradients; skip []: change nothing."""
        if self._takes_flag and skip is not None:
            self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
            self.optimizer.step()
            self._num_taken += ~skip
            self._set_rate()
        # Only apex's FusedAdam takes no flag: under float16 the host waits here to read `skip`.
        elif skip is None or not skip:
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's and the schedule's states, alike for a rate on the host or the device."""
        optimizer, schedule = self.optimizer.state_dict(), self.schedule.state_dict()
        if self._takes_flag:
            taken, rate = self.num_taken, float(self._rate)
            rates = [rate] * len(optimizer["param_groups"])
            schedule |= {"last_epoch": taken, "_step_count": taken + 1, "_last_lr": rates}
            for group in optimizer["param_groups"]:
                group["lr"] = rate
        return {"optimizer": optimizer, "scheduler": schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["scheduler"])
        if self._takes_flag:
            self._num_taken.fill_(self.schedule.last_epoch)
            self._set_rate()


def check_schedule(config: TrainingConfig, learning_rate: float, num_steps: int) -> None:
    """Refuse options with which `new_schedule` will fail for a stage of so many steps.

    Raises:
        ValueError: as `new_schedule`.
    """
    parameter = torch.zeros(1, requires_grad=True)
    new_schedule(torch.optim.SGD([parameter], lr=learning_rate), config, num_steps)


def new_schedule(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule `lr_scheduler_type` of transformers over the steps of a stage.

    Raises:
        ValueError: it does not take `lr_scheduler_kwargs`, or needs some; this version of
            transformers does not have it; the warm-up is longer than the stage.
    """
    options = config.optimization
    num_warmup = options.warmup_steps
    if num_warmup is None:
        num_warmup = round(options.warmup_ratio * num_steps)
    elif num_warmup > num_steps and options.lr_scheduler_type != "constant":
        raise ValueError(
            f"warmup_steps={num_warmup}: the stage has {num_steps} steps, so the learning rate "
            "would never reach its peak. Use fewer, or a share such as warmup_ratio=0.1."
        )
    given, arguments = options.lr_scheduler_type, config.schedule_arguments
    try:
        schedule = get_scheduler(given, optimizer, num_warmup, num_steps, arguments)
        factors = [schedule.lr_lambdas[0](step) for step in (0, num_steps // 2, num_steps)]
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type={given} with lr_scheduler_kwargs={arguments}: {error}"
        ) from None
    if not all(isinstance(factor, int | float) and factor >= 0 for factor in factors):
        raise ValueError(
            f"lr_scheduler_type={given} with lr_scheduler_kwargs={arguments} makes learning rates "
            f"that are negative or no numbers: {factors} of the peak."
        )
    return schedule
