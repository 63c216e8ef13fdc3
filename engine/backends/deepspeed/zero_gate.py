"""The gate for a DeepSpeed engine in anybody's loop."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ....kernels.gradients.angle import choose
from ...objectives.gate import (
    CALLS_PER_CHECK,
    GateDecision,
    check_limits,
    graph_nodes,
    is_reentrant,
)
from .gradients import check_version
from .offload import zero_gradients
from .zero_step import ZeroStep

# Wrappers whose reduced gradients `stages` knows how to reach.
_KNOWN_OPTIMIZERS = (
    "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "FP16_UnfusedOptimizer",
)


class ZeroGate:
    """`GradientGate` for a DeepSpeed engine of ZeRO stage 0, 1, 2 or 3.

        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        gate = ZeroGate(engine, weight=0.02)
        outputs = engine(**batch)
        gate.backward(main_loss, auxiliary_loss)  # for engine.backward(loss)
        decision = gate.step()  # for engine.step()

    There is one decision per optimizer step, on the gradients averaged over all processes, the same
    on each. Precision, gradient accumulation, loss scaling, clipping and schedule are those of the
    engine's configuration, except that a parameter that no gradient has reached stays as it is.
    Until `close`, `engine.backward` and `engine.step` are refused.

    Args:
        engine: of `deepspeed.initialize`, of a DeepSpeed in `gradients.SUPPORTED`; the optimizer in
            half precision under stage 0 is one of PyTorch, not DeepSpeed's FusedAdam.
        weight: lambda, in [0, 1].
        max_angle: degrees, in [0, 180].
        groups: the group 0 .. G-1 of each trained parameter, in the order of
            `engine.module.parameters()`; each has its own decision. None: one decision for all.
        impl: implementation of `grad_dot_norm` and `gated_combine_`.

    Raises:
        ValueError: DeepSpeed is missing or another version, the engine uses something that takes
            part in its reductions and is not known here, or a value is out of range.
    """

    def __init__(
        self,
        engine: Any,
        *,
        weight: float = 0.02,
        max_angle: float = 90.0,
        groups: Sequence[int] | None = None,
        impl: str = "auto",
    ) -> None:
        check_version()
        _check_engine(engine)
        check_limits(weight, max_angle)
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        given = [0] * len(trained) if groups is None else list(groups)
        if len(given) != len(trained) or min(given) < 0:
            raise ValueError(
                f"groups={given}: one integer, 0 or more, for each of the {len(trained)} trained "
                "parameters."
            )
        offloads = bool(engine.zero_cpu_offload())
        on_cpu = offloads and engine.zero_optimization_stage() > 0
        # Before `zero_gradients` changes the engine.
        choose(impl, torch.device("cpu") if on_cpu else engine.device)
        self.engine = engine
        self.gradients = zero_gradients(engine, 2, offloads=offloads)
        self._both = ZeroStep(
            self.gradients,
            dict(zip(map(id, trained), given, strict=True)),
            weight=weight,
            max_angle=max_angle,
            impl=impl,
        )
        self._scale = _EngineScale(engine)
        self._num_batches = self._num_calls = 0
        engine.forward = self._forward
        engine.backward = _refuse("backward", "gate.backward(main_loss, auxiliary_loss)")
        engine.step = _refuse("step", "gate.step()")

    def _forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The engine's `forward` without its hooks on the outputs, which expect one backward."""
        if hasattr(self.engine.optimizer, "clear_backward_seen_flag"):
            self.engine.optimizer.clear_backward_seen_flag()
        return self.engine.module(*inputs, **kwargs)

    def backward(
        self, main_loss: Tensor, auxiliary_loss: Tensor, *, scale_wrt_gas: bool = True
    ) -> None:
        """Add the gradients of both losses of one (micro-)batch; they may share their graph.

        scale_wrt_gas: divide by gradient_accumulation_steps, as `engine.backward` does.

        Raises:
            ValueError: activations are checkpointed with use_reentrant=True.
        """
        if self._num_calls % CALLS_PER_CHECK == 0 and any(
            map(is_reentrant, graph_nodes((main_loss, auxiliary_loss)))
        ):
            raise ValueError(
                "The model computes activations again with use_reentrant=True, where the gradients "
                "of two losses cannot be told apart: use use_reentrant=False."
            )
        self._num_calls += 1
        factor = 1.0 / self.engine.gradient_accumulation_steps() if scale_wrt_gas else 1.0
        if self.gradients.wants_scaled_loss:
            factor *= self._scale.value
        self._both.accumulate(main_loss, auxiliary_loss, factor=factor)
        self._num_batches += 1

    def step(self, *, boundary: bool | None = None) -> GateDecision | None:
        """Decide, combine and update, or skip after an overflow of float16. Collective.

        Args:
            boundary: whether an optimizer step is due; None: after every
                gradient_accumulation_steps micro-batches. Where none is due, nothing happens.

        Returns:
            The decision; None where no optimizer step was due.

        Raises:
            ValueError: there are no gradients.
            FloatingPointError: the gradient is NaN or infinite, and no loss scale can mend that.
        """
        if not self._num_batches:
            raise ValueError("step: no gradients; call gate.backward(main, auxiliary) before it.")
        if boundary is None:
            boundary = self._num_batches >= self.engine.gradient_accumulation_steps()
        if not boundary:
            self.engine.micro_steps += 1
            return None
        made = self._both.step(scale=self._scale.value, may_overflow=self._scale.enabled)
        self._scale.update(not made.finite)
        self._num_batches = 0
        return made.decision

    def close(self) -> None:
        """Give the engine its own `forward`, `backward` and `step` back."""
        for name in ("forward", "backward", "step"):
            self.engine.__dict__.pop(name, None)
        self._scale.close()
        self.gradients.release()
        self.engine.set_gradient_accumulation_boundary(None)


class _EngineScale:
    """The loss scale of an engine, which stays the same until a step is over.

    DeepSpeed raises it in the middle of a step, and divides that step's gradients by the new one.
    """

    def __init__(self, engine: Any) -> None:
        self.enabled = bool(engine.fp16_enabled())
        self._optimizer = engine.optimizer
        if self.enabled:
            self._optimizer._update_scale = lambda overflow: None

    @property
    def value(self) -> float:
        return float(self._optimizer.loss_scale) if self.enabled else 1.0

    def update(self, overflow: bool) -> None:
        if self.enabled:
            type(self._optimizer)._update_scale(self._optimizer, overflow)

    def close(self) -> None:
        self._optimizer.__dict__.pop("_update_scale", None)


def _refuse(name: str, instead: str) -> Any:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"engine.{name} would lose one of the two gradients: call {instead}, or gate.close() "
            "to end the gate."
        )

    return refuse


def _check_engine(engine: Any) -> None:
    """Refuse engines whose gradients lie, or are reduced, in ways that are not known here."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    if type(engine) is not DeepSpeedEngine:
        raise ValueError(
            f"engine is a {type(engine).__name__}: pass what deepspeed.initialize returned for a "
            "model without pipeline parallelism."
        )
    if "forward" in vars(engine):
        raise ValueError("engine: it has a gate already; close() that one first.")
    optimizer, stage = type(engine.optimizer).__name__, int(engine.zero_optimization_stage())
    if engine.optimizer is None or optimizer == "DummyOptim":
        raise ValueError("engine: it has no optimizer. Pass one to deepspeed.initialize.")
    zero = engine._config.zero_config
    offload = zero.offload_optimizer
    half = engine.fp16_enabled() or engine.bfloat16_enabled()
    used = {
        f"the optimizer {optimizer} (leave data_types out, take one of torch.optim)": (
            optimizer not in _KNOWN_OPTIMIZERS and bool(stage or half)
        ),
        "managed_gradient_accumulation=false": not engine.managed_gradient_accumulation(),
        "torch_autocast": engine.torch_autocast_enabled(),
        "mixture-of-experts layers": engine.has_moe_layers,
        "ZenFlow": bool(engine.zenflow),
        "engine.compile()": engine.is_compiled,
        "DeepCompile": engine.is_deepcompile_enabled(),
        "tensor parallelism": engine.mp_world_size > 1,
        "sequence parallelism": engine.sequence_parallel_size > 1,
        "offload_param": zero.offload_param is not None and zero.offload_param.device != "none",
        "offload_optimizer to a disk": offload is not None and offload.device == "nvme",
        "a part of the optimizer offloaded (ratio)": engine.zero_partial_offload() != 1.0,
        "hierarchical partitions (hpZ)": zero.zero_hpz_partition_size > 1,
        "quantized weights or gradients": (
            zero.zero_quantized_weights or zero.zero_quantized_gradients
        ),
    }
    for what, found in used.items():
        if found:
            raise ValueError(f"engine: ZeroGate does not support {what}. Make one without it.")
