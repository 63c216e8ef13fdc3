"""The DeepSpeed backend: several processes, ZeRO 0 to 3."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from ....kernels.gradients.angle import choose
from ...objectives.gate import decision_of, used_weight, weighted_sum
from ...objectives.losses import ExitLosses
from ...runtime import processes
from ...runtime.profiler_marks import GATE, OPTIMIZER, part
from ..interface import Backend, StepReport
from ..loss_scaling import DeepSpeedLossScaler
from ..optimizers import decay_groups, new_optimizer, new_schedule
from .gate_scope import SharedScope
from .gradients import ZeroGradients, check_version
from .offload import zero_gradients
from .resharding import load_parts, places
from .settings import complete
from .zero_step import ZeroStep


@dataclass(eq=False, repr=False)
class DeepSpeedBackend(Backend):
    """Forward context, backward passes and one optimizer step, on all processes alike.

    Every process calls the same methods in the same order and with as many micro-batches per step,
    because each of them exchanges gradients. The model's weights are in the precision of the run
    until `close`, which gives them back whole and in float32.

    Args: as for `Backend`, and
        deepspeed_config: the JSON object; see `settings.complete`.

    Raises:
        ValueError: DeepSpeed is missing or another version, or a setting that cannot work.
    """

    _: KW_ONLY
    deepspeed_config: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        options, objective = self.config.optimization, self.config.objective
        # Whether both gradients of all parameters are kept. With a scope the decision is taken in
        # `backward`, before any gradient is accumulated.
        self.gated = self.config.gated and self.gate_scope == "all"
        self.scope: SharedScope | None = None
        self._scope_stats: Tensor | None = None
        if objective.gate_agreement_steps:
            raise ValueError(
                f"gate_agreement_steps={objective.gate_agreement_steps}: under DeepSpeed "
                "there is no exact decision beside that of gate_scope. Compare them in a run of "
                "one process without deepspeed_config, and leave it out here."
            )
        check_version()
        _check_groups(self.model, self.parameters)
        self.settings = complete(
            self.deepspeed_config,
            self.config,
            world_size=processes.world_size(),
            num_trained=sum(p.numel() for p in self.parameters),
            clips=not self.independent,
        )
        choose(self.impl, torch.device("cpu") if self.settings.offloads else self.device)
        self.scaler: DeepSpeedLossScaler = DeepSpeedLossScaler(
            self.dtype == torch.float16, self.settings.loss_scale
        )
        # A group of the optimizer holds parameters of one gate group only: the steps of a gate
        # group that no gradient reached must not be counted with those of the others.
        parts = [
            part
            for group in self.groups.values()
            for part in decay_groups(group, options.weight_decay)
            if part["params"]
        ]
        base = new_optimizer(options, parts, self.learning_rate, self.device)
        self.scheduler = new_schedule(base, self.config, self.num_steps)
        if self.config.gated and self.gate_scope != "all":
            self.scope = SharedScope(self.model, self.gate_scope)
        # DeepSpeed rounds the weights to half precision, and would make its masters from that.
        before = {id(p): p.detach().clone() for p in self.parameters}
        self._frozen: dict[int, Tensor] = {}
        if self.dtype != torch.float32:
            frozen = (p for p in self.model.parameters() if not p.requires_grad)
            self._frozen = {id(p): p.detach().cpu().clone() for p in frozen}
        # ZeRO 3 replaces it, for every model of the process, by one that rounds differently.
        self._linear = functional.linear
        # DeepSpeed reads it without a launcher too, ZeRO 3 in every step.
        self._sets_local_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", "0")
        try:
            self.engine = _initialize(
                self.settings.config,
                self.device,
                model=self.model,
                optimizer=base,
                lr_scheduler=self.scheduler,
            )
        except BaseException:
            self._forget_local_rank()
            raise
        self.gradients: ZeroGradients = zero_gradients(
            self.engine, 2 if self.gated else 1, offloads=self.settings.offloads
        )
        self.gradients.start_from(before)
        self.gradients.set_loss_scale(self.scaler.scale)
        self.both = ZeroStep(
            self.gradients,
            {id(p): i for i, group in enumerate(self.groups.values()) for p in group},
            weight=self.weight,
            max_angle=self.max_angle,
            impl=self.impl,
            independent=self.independent,
            max_norm=self.max_norm,
        )
        self._in_forward = False

    def forward_context(self) -> AbstractContextManager[Any]:
        return self._forward() if self.settings.stage == 3 else contextlib.nullcontext()

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        if not self._in_forward:
            self._in_forward = True
            self.gradients.begin_forward()
        self.engine._forward_prologue((), {})
        try:
            yield
        finally:
            self.engine._forward_epilogue()

    def backward(self, losses: ExitLosses) -> None:
        self._in_forward = False
        # DeepSpeed takes the mean over the processes.
        factor = float(processes.world_size())
        if self.gradients.wants_scaled_loss:
            factor *= self.scaler.scale
        auxiliary: Tensor | None = None
        if self.scope is not None and losses.auxiliary is not None:
            loss = self._decided(losses, processes.world_size())
        elif not self.gated or losses.auxiliary is None:
            loss = losses.weighted(self.weight)
        else:
            loss, auxiliary = losses.main.sum(), losses.auxiliary.sum()
        self.both.accumulate(loss, auxiliary, factor=factor)

    @part(GATE)
    def _decided(self, losses: ExitLosses, factor: float) -> Tensor:
        """The losses, weighted as the angle over the scope says, alike on every process."""
        assert self.scope is not None and losses.auxiliary is not None
        assert self._scope_stats is None, "the configuration allows one batch a step"
        main, auxiliary = losses.main.sum(), losses.auxiliary.sum()
        scaled = factor * self.scaler.scale
        self._scope_stats = self.scope.stats(
            self.gradients, scaled * main, scaled * auxiliary, self.impl
        )
        used = used_weight(self._scope_stats, self.weight, self.max_angle)
        return weighted_sum(main, auxiliary, used)

    @part(OPTIMIZER)
    def step(self, *, compare: bool = False) -> StepReport:
        """Decide, unscale, clip and update, or skip, alike on every process.

        compare: always False; the constructor refuses the option that asks for it.

        Raises:
            FloatingPointError: the gradient is NaN or infinite, and no loss scale can mend that.
        """
        assert not compare
        learning_rate = self.scheduler.get_last_lr()[0]
        scale, stats = self.scaler.scale, self._scope_stats
        others = [] if stats is None else [stats]
        made = self.both.step(scale=scale, may_overflow=self.scaler.enabled, others=others)
        decision = made.decision
        if stats is not None:
            used = used_weight(stats, self.weight, self.max_angle)
            decision = decision_of(stats, used, self.max_angle, made.grad_norm)
            self._scope_stats = None
        self.scaler.update(overflow=not made.finite)
        self.gradients.set_loss_scale(self.scaler.scale)
        return StepReport(made.grad_norm, learning_rate, scale, not made.finite, decision)

    def state_dict(self) -> dict[str, Any]:
        with self.gradients.wrapped_optimizer() as optimizer:
            optimizer_state = optimizer.state_dict()
            held = [tuple(place) for place in places(self.gradients, optimizer)]
        return {
            "masters": [master.detach().clone() for master in self.gradients.masters()],
            "optimizer": optimizer_state,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "layout": self._layout(),
            "places": held,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict` of the same process. Collective.

        Raises:
            ValueError: it comes from a run without DeepSpeed, another number of processes, another
                process or ZeRO stage.
        """
        if "layout" not in state:
            raise ValueError(
                "The checkpoint was saved by a run without DeepSpeed: resume without a launcher."
            )
        layout = self._layout()
        if state["layout"] != layout:
            words = "process {rank} of {world_size} under ZeRO {stage} in {dtype}"
            was, now = (words.format(**which) for which in (state["layout"], layout))
            raise ValueError(
                f"The checkpoint's optimizer belongs to {was}; this is {now}. Resume with as many "
                "processes and the same ZeRO stage."
            )
        with torch.no_grad():
            for master, saved in zip(self.gradients.masters(), state["masters"], strict=True):
                master.data.copy_(saved)
        with self.gradients.wrapped_optimizer() as optimizer:
            optimizer.load_state_dict(state["optimizer"])
        self._go_on(state)

    def load_parts(self, states: Sequence[dict[str, Any]]) -> None:
        load_parts(self.gradients, states)
        self._go_on(states[0])

    def _go_on(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.gradients.publish()
        self.gradients.set_loss_scale(self.scaler.scale)

    def _layout(self) -> dict[str, Any]:
        return {
            "stage": self.settings.stage,
            "world_size": processes.world_size(),
            "rank": processes.rank(),
            "dtype": str(self.dtype),
            "sizes": [master.numel() for master in self.gradients.masters()],
        }

    def full_state_dict(self) -> dict[str, Tensor]:
        # Trained weights come from the optimizer's masters, frozen ones from before their rounding.
        return self.gradients.full_state_dict(self._frozen)

    def close(self) -> None:
        """End training and give the model its weights back, whole, in float32. Collective.

        A new backend may then be made for other trained parameters. Close this one before freezing
        parameters, which DeepSpeed would go on updating.
        """
        full = self.full_state_dict()
        self.gradients.release()
        if self.scope is not None:
            self.scope.close()
        self.engine.destroy()
        # Left in place, these would shard what the model does from now on.
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        functional.linear = self._linear
        self._forget_local_rank()
        _make_plain(self.model, full, self.device)

    def _forget_local_rank(self) -> None:
        if self._sets_local_rank:
            del os.environ["LOCAL_RANK"]  # other libraries would take it for a launcher's


def _initialize(config: dict[str, Any], device: torch.device, **arguments: Any) -> Any:
    """`deepspeed.initialize`, kept from compiling an extension on a machine without GPUs."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed uses names that torch has deprecated; a user of fusedacl can do nothing about it.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    chosen = get_accelerator().device_name()
    if chosen != device.type:
        raise ValueError(
            f"device={device.type}: DeepSpeed computes on {chosen} here. Set the environment "
            f"variable DS_ACCELERATOR={device.type}, or device={chosen}."
        )
    if "fp16" in config and not get_accelerator().is_fp16_supported():
        raise ValueError(
            "fp16: DeepSpeed refuses it on this device, which has no such arithmetic. Use bf16 or "
            "neither, or run without deepspeed_config, where float16 is emulated."
        )
    # Used on a CPU only, where compiling it takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    engine, *_ = deepspeed.initialize(config=config, **arguments)
    return engine


def _check_groups(model: nn.Module, parameters: Sequence[Parameter]) -> None:
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained or trained != {id(p) for p in parameters} or len(parameters) != len(trained):
        raise ValueError(
            "groups must hold each parameter with requires_grad=True once, and no other: DeepSpeed "
            f"updates all of them (groups: {len(parameters)}, trained: {len(trained)})."
        )


def _make_plain(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Replace every parameter of a model by an ordinary one with these values."""
    made: dict[int, Parameter] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        # ZeRO 3 replaces the dictionary of parameters and keeps the original one.
        plain = getattr(module, "_original_parameters", None)
        parameters = {} if plain is None else plain
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) not in made:
                value = weights[prefix + name]
                # A copy, because the caller may keep the state dict while the model trains on.
                made[id(old)] = Parameter(
                    value.to(device, copy=True), requires_grad=old.requires_grad
                )
            parameters[name] = None if old is None else made[id(old)]
        if plain is None:
            module._parameters.update(parameters)
        else:
            module._parameters = parameters
            del module._original_parameters
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                saved = weights.get(prefix + name)
                module._buffers[name] = buffer.float() if saved is None else saved.to(device)
