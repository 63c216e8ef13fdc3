"""Measuring the angle between the gradients of two losses, in any loop, without changing it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import TrainerCallback

from ...kernels import angle_degrees, grad_dot_norm
from ...kernels.gradients.angle import choose
from ..objectives.gate import scope_gradients


class AngleMonitor(TrainerCallback):
    """The angle, in degrees, between the gradients of two losses, every so many steps.

        monitor = AngleMonitor(model.parameters(), every=50)
        angle = monitor.measure(main_loss, other_loss)  # in each step, before the backward pass

    `measure` returns None in the steps between. A step that is measured costs two backward passes
    more, and the memory of two gradients; nothing else changes: `.grad`, the graph and the hooks of
    DistributedDataParallel stay as they are. Measuring the parameters of the last layers alone
    costs less.

    It is a callback of transformers' Trainer too: `compute_loss` calls `measure`, and the mean
    angle since the last log goes into `log_history` and to the callbacks that come later
    (`trainer.callback_handler.callbacks.insert(0, monitor)` makes it the first). With `ACLTrainer`
    nothing needs to be called.

    A compiled model reuses the memory of its graph in the first backward pass: in a loop other than
    `ACLTrainer` set `torch._functorch.config.donated_buffer = False` before its first forward pass.

    Args:
        parameters: those to take the gradients of. None: as a callback, all trained parameters.
        every: steps from one measurement to the next; the first step is measured. With gradient
            accumulation, the first batch of a step is.
        name: key in the log.
        process_group: processes that hold the same parameters but other texts, whose gradients are
            averaged; None: this process alone, or as a callback all those of the Trainer.
        impl: implementation of `grad_dot_norm`.

    Raises:
        ValueError: `every` is less than 1, or there is no trained parameter.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter] | None = None,
        *,
        every: int = 50,
        name: str = "angle_degrees",
        process_group: ProcessGroup | None = None,
        impl: str = "auto",
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} steps must be at least 1.")
        self.every = every
        self.name = name
        self.process_group = process_group
        self.impl = impl
        self.parameters: list[Parameter] | None = None
        # Otherwise each training begins with those of its model.
        self._is_given = parameters is not None
        if parameters is not None:
            self._take_parameters(parameters)
        self._step = 0
        self._is_callback = False
        self._num_calls = 0
        self._angles: list[Tensor] = []

    def _take_parameters(self, parameters: Iterable[Parameter]) -> None:
        found = [p for p in dict.fromkeys(parameters) if p.requires_grad]
        if not found:
            raise ValueError("parameters: none has requires_grad=True, so there is no gradient.")
        # Both kinds take gradients out of the graph before anybody else sees them whole.
        if any(is_traceable_wrapper_subclass(p) or hasattr(p, "ds_tensor") for p in found):
            raise ValueError(
                "parameters: they are sharded (FSDP2 or ZeRO 3), so that a process has a part of "
                "each gradient. Measure under DistributedDataParallel or ZeRO 0 to 2, or use the "
                "decision of GradientGate or ZeroGate."
            )
        self.parameters = found
        choose(self.impl, found[0].device)

    def measure(self, first: Tensor, second: Tensor) -> Tensor | None:
        """The angle [] between the gradients of two losses; None in a step that is not measured.

        It stays on the device. Both losses may carry the factor of a loss scaler. With a
        process_group all its processes must call. Under `no_grad`, as in an evaluation, nothing is
        measured or counted.

        Raises:
            ValueError: the parameters are not known, neither loss depends on them, a loss has no
                graph, or the model was compiled for one backward pass.
        """
        if not torch.is_grad_enabled():
            return None
        self._num_calls += 1
        due = self._step % self.every == 0 and (not self._is_callback or self._num_calls == 1)
        if not self._is_callback:
            self._step += 1
        if not due:
            return None
        if self.parameters is None:
            raise ValueError("AngleMonitor has no parameters: pass model.parameters().")
        if not (first.requires_grad and second.requires_grad):
            raise ValueError(
                "AngleMonitor.measure: a loss has no graph. Pass both as tensors that require a "
                "gradient, before the backward pass."
            )
        gradients = [list(scope_gradients(loss, self.parameters)) for loss in (first, second)]
        is_reached = any(part is not None for parts in gradients for part in parts)
        if self.process_group is not None:
            gradients = [[self._total(parts)] for parts in gradients]
            number = torch.full((), float(is_reached), device=self.parameters[0].device)
            torch.distributed.all_reduce(number, group=self.process_group)
            # Only a process that has no gradient of its own waits for the device.
            is_reached = is_reached or bool(number > 0)
        if not is_reached:
            raise ValueError(
                "AngleMonitor: neither loss depends on its parameters (was the model made or "
                "loaded again?). Pass those of the model that computes the losses."
            )
        stats = grad_dot_norm(*gradients, impl=self.impl)
        angle = angle_degrees(stats)[0]
        if self._is_callback:
            self._angles.append(angle)
        return angle

    def _total(self, gradients: list[Tensor | None]) -> Tensor:
        """The sum of a loss's gradients over the processes; the angle needs no mean."""
        assert self.parameters is not None
        parts = zip(gradients, self.parameters, strict=True)
        flat = torch.cat(
            [(torch.zeros_like(p) if part is None else part).float().flatten() for part, p in parts]
        )
        torch.distributed.all_reduce(flat, group=self.process_group)
        return flat

    def take(self) -> dict[str, float]:
        """The mean angle since the last call, {} if none was measured. Waits for the device."""
        angles, self._angles = self._angles, []
        if not angles:
            return {}
        # A gradient that overflowed has no angle.
        return {self.name: torch.stack(angles).nanmean().item()}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._is_callback = True
        self._step, self._num_calls, self._angles = state.global_step, 0, []
        if not self._is_given:
            self._take_parameters(model.parameters())
        elif set(self.parameters or ()).isdisjoint(model.parameters()):
            raise ValueError(
                "parameters: none of those given to AngleMonitor is in the model that is trained "
                "(was it made or loaded again, or sharded?). Leave them out for all trained ones."
            )
        if args.world_size > 1 and self.process_group is None:
            self.process_group = torch.distributed.group.WORLD

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._num_calls == 0:
            raise ValueError(
                "AngleMonitor: this loop gives one loss, and an angle needs two. Call "
                "monitor.measure(main_loss, other_loss) in compute_loss, or use ACLTrainer with "
                "objective=scl or acl."
            )
        self._step, self._num_calls = state.global_step, 0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any
    ) -> None:
        if logs is None or "loss" not in logs:
            # A hyper-parameter search sums the metrics of an evaluation: the angle must not be one.
            return
        found = self.take()
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_callback = False
