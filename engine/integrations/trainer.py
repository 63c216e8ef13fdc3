"""`ACLTrainer`: transformers' Trainer with our objective and the gate."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import Trainer

from ..backends.deepspeed.zero_gate import ZeroGate
from ..config.gate_scope import parse_scope
from ..model.answers import IGNORED
from ..objectives.gate import GateDecision, GradientGate
from ..objectives.losses import ExitLosses
from ..training.forward.dropout import fast_dropout, runs_again
from .arguments import ACLTrainingArguments
from .gates import GateLog, ScopeDecision, decided_loss
from .monitor import AngleMonitor
from .objective import TrainerObjective

logger = logging.getLogger("fusedacl")


class ACLTrainer(Trainer):
    """transformers' Trainer with cross-entropy beside a contrastive loss, and the gate (ACL-Grad).

        trainer = ACLTrainer(model, ACLTrainingArguments("out", objective="acl"), …)
        trainer.train()

    The model is `MultiExitForSequenceClassification`, or any model for sequence classification
    whose last layer is linear: the rows of that layer's weight are the label embeddings, and what
    it reads are the representations. One decision is taken per optimizer step, on the gradients of
    all its batches and processes. Trainer's log gets the means since the last one: `loss_ce`,
    `loss_aux`, `angle_degrees` and `gate_kept`, the share of steps in which the contrastive
    gradient was kept. Evaluation is Trainer's own.

    Args: those of Trainer; `args` is an `ACLTrainingArguments`.

    Raises:
        TypeError, ValueError: a model or an option that the objective cannot work with.
    """

    args: ACLTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._objective: TrainerObjective | None = None
        self._is_exact = False
        # The model as Trainer has wrapped it for its loop.
        self._placed: nn.Module | None = None
        self._exact: GradientGate | ZeroGate | None = None
        self._scoped: ScopeDecision | None = None
        self._gate_log = GateLog()
        # Texts of the current step, and the losses [3, E] of its batches so far.
        self._num_texts: Tensor | None = None
        self._step_losses: list[Tensor] = []
        self._in_train = False
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, ACLTrainingArguments):
            raise TypeError(
                f"args is a {type(self.args).__name__}: pass ACLTrainingArguments, which hold the "
                "options of the objective beside those of Trainer."
            )
        self._refuse()
        # Each loss here is a mean over its batch, whose share of the step it is multiplied by.
        self.model_accepts_loss_kwargs = False
        assert self.model is not None, "Trainer refuses to be without one"
        objective = TrainerObjective(self.model, self.args)
        objective.close()
        self._scope_decision(objective)
        if objective.config.without_effect:
            words = ", ".join(objective.config.without_effect)
            name = self.args.objective
            logger.info(f"these options have no effect with objective={name}: {words}.")

    def _refuse(self) -> None:
        """Refuse what cannot work, before anything is trained."""
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func: ACLTrainer computes its own losses, cross-entropy and the "
                "contrastive one. Leave it out, or use GradientGate with two losses of your own."
            )
        if self.is_model_parallel:
            raise ValueError(
                "model: device_map has spread it over several devices, and ACLTrainer needs it "
                "whole on one. Load it without device_map, or shard it with FSDP2 or DeepSpeed."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process: ACLTrainer needs one process per GPU. "
                "Start it with `torchrun --nproc_per_node=…`, or make one GPU visible "
                "(CUDA_VISIBLE_DEVICES=0)."
            )
        if self._shards and parse_scope(self.args.gate_scope) is not None:
            raise ValueError(
                f"gate_scope={self.args.gate_scope}: under FSDP and DeepSpeed the gate compares "
                "the gradients of all parameters. Use gate_scope=all, or DistributedDataParallel."
            )
        if self._kind == "FSDP" and not getattr(self.accelerator, "is_fsdp2", False):
            raise ValueError(
                "fsdp: version 1 flattens the parameters, so the gate cannot take two gradients of "
                "them. Use fsdp_config={'version': 2}, or DeepSpeed."
            )
        if getattr(self, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                "model: from_pretrained(distributed_config=…) has sharded it. Load it without, and "
                "let Trainer shard it (fsdp or deepspeed)."
            )

    @property
    def _monitors(self) -> list[AngleMonitor]:
        callbacks = self.callback_handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, AngleMonitor)]

    @property
    def _kind(self) -> str:
        """Accelerate's name for the way gradients are averaged: MULTI_GPU, FSDP, DEEPSPEED, …"""
        return str(self.accelerator.distributed_type.value)

    @property
    def _shards(self) -> bool:
        """True if a process may hold parts of the parameters only."""
        return self._kind in ("FSDP", "DEEPSPEED")

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a model, as Trainer does; in `train`, freeze what is not trained."""
        model = super().call_model_init(trial)
        if self._in_train:
            self._begin(model)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does."""
        self._in_train = True
        try:
            if self.model_init is None:
                self._begin(self.accelerator.unwrap_model(self.model))
            return super().train(*args, **kwargs)
        finally:
            self._end()

    def _begin(self, model: nn.Module) -> None:
        self._end()
        self._in_train = True
        self._objective = objective = TrainerObjective(model, self.args)
        self._gate_log = GateLog()
        config = objective.config
        for monitor in self._monitors if config.gated else ():
            if monitor.name.partition(" ")[0] == "angle_degrees":
                raise ValueError(
                    f"AngleMonitor(name={monitor.name!r}): the gate logs its own angle under this "
                    "name. Give the monitor another one, such as name='measured_angle'."
                )
        self._scoped = self._scope_decision(objective)
        self._is_exact = config.gated and self._scoped is None

    def _scope_decision(self, objective: TrainerObjective) -> ScopeDecision | None:
        """The decision over a part of the model; None where the options ask for none."""
        options = objective.config.objective
        if not objective.config.gated or parse_scope(options.gate_scope) is None:
            return None
        return ScopeDecision(
            objective.classifiers, options.gate_scope, options, self._process_group
        )

    def _exact_gate(self, model: nn.Module) -> GradientGate | ZeroGate:
        """The gate over all trained parameters; made in the first step, when they are in place."""
        if self._exact is not None:
            return self._exact
        assert self._objective is not None
        options = self._objective.config.objective
        settings: dict[str, Any] = {
            "groups": self._objective.groups(),
            "weight": options.aux_weight,
            "max_angle": options.max_angle,
            "impl": options.impl,
        }
        if self._kind == "DEEPSPEED":
            self._exact = ZeroGate(model, **settings)
            return self._exact
        if self._kind == "FSDP":
            # An evaluation before training has left some parameters whole.
            for module in model.modules():
                reshard: Any = getattr(module, "reshard", None)
                if callable(reshard):
                    reshard()
        group = None if self._shards else self._process_group
        trained = self._objective.trained()
        self._exact = GradientGate(trained, process_group=group, **settings)
        return self._exact

    def _close_gate(self) -> None:
        if isinstance(self._exact, ZeroGate):
            self._exact.close()
        self._exact = None
        self._step_losses = []

    def _end(self) -> None:
        self._close_gate()
        if self._objective is not None:
            self._objective.close()
        self._objective = self._scoped = self._placed = None
        self._in_train = False

    @property
    def _process_group(self) -> ProcessGroup | None:
        if self.accelerator.num_processes == 1:
            return None
        return torch.distributed.group.WORLD

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of an optimizer step, whose texts are counted here."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        counts = [_num_labels(batch) for batch in batches]
        self._num_texts = torch.as_tensor(sum(counts)).clamp(min=1)
        gate = self._exact
        if isinstance(gate, GradientGate) and all(p.grad is None for p in gate.parameters):
            # After running out of memory Trainer drops a step's main gradients: drop the auxiliary
            # ones too. Those of an incomplete last step of an epoch it keeps for the next step.
            gate.reset()
            self._step_losses = []
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of both losses in training, with this batch's share of the step.

        In evaluation it is Trainer's: the cross-entropy.
        """
        if self._objective is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, output, share = self._losses(model, inputs)
        if self._scoped is None:
            loss = losses.weighted(self._objective.config.objective.aux_weight)
        else:
            scale = self._scaled(losses.main.new_ones(()))
            loss, decision = self._scoped.weigh(losses, scale)
            self._gate_log.add_decision(self._objective.group_names, decision)
        # Trainer divides by the number of batches.
        loss = loss * (share * self.current_gradient_accumulation_steps)
        return (loss, output) if return_outputs else loss

    def _losses(
        self, model: nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[ExitLosses, Any, Tensor]:
        """Losses and output of a batch, and its part [] of the texts of its optimizer step."""
        assert self._objective is not None
        is_global = self._objective.config.optimization.negatives == "global"
        group = self._process_group if is_global else None
        compiled = self.args.torch_compile or runs_again(model)
        with fast_dropout(self.args.device, compiled):
            losses, output = self._objective.losses(model, inputs, group)
        share = torch.ones_like(losses.main[0])
        if self._num_texts is not None:
            share = _num_labels(inputs) / self._num_texts.to(share.device, non_blocking=True)
        assert losses.cross_entropy is not None
        values = {"loss_ce": losses.cross_entropy.sum()}
        if losses.auxiliary is not None:
            values["loss_aux"] = losses.auxiliary.sum()
            for monitor in self._monitors:
                monitor.measure(*map(self._scaled, (losses.main.sum(), losses.auxiliary.sum())))
        self._gate_log.add(values, share)
        return losses, output, share

    def _scaled(self, loss: Tensor) -> Tensor:
        scaler = self.accelerator.scaler
        return loss if scaler is None else scaler.scale(loss)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward passes of one batch; after the last one of a step, the decision."""
        if self._objective is not None and self._placed is not model:
            # With auto_find_batch_size Trainer may begin again, with another engine.
            self._close_gate()
            self._placed = model
            self._objective.classifiers.keep_whole()
        if self._objective is None or not self._is_exact:
            with self._two_backward_passes():
                return super().training_step(model, inputs, num_items_in_batch)
        gate = self._exact_gate(model)
        model.train()
        # Schedule-free optimizers have a mode for training and one for evaluation.
        resume_training: Any = getattr(self.optimizer, "train", None)
        if callable(resume_training):
            resume_training()
        inputs = self._prepare_inputs(inputs)
        averages = nullcontext() if self._shards else self.accelerator.no_sync(model)
        with self._two_backward_passes(), averages:
            with self.compute_loss_context_manager():
                losses, _, share = self._losses(model, inputs)
            self._empty_cache()
            losses = losses.times(share, share)
            decision = self._back_propagate(gate, losses)
        self._step_losses.append(losses.values())
        if decision is None:
            # The loss of a step is known once its weights are.
            return losses.main.new_zeros(())
        self._gate_log.add_decision(self._objective.group_names, decision)
        values, self._step_losses = torch.stack(self._step_losses).sum(0), []
        return decided_loss(values, decision, self._objective.config.objective.aux_weight)

    def _back_propagate(
        self, gate: GradientGate | ZeroGate, losses: ExitLosses
    ) -> GateDecision | None:
        """Both backward passes; the decision after the last batch of a step."""
        assert losses.auxiliary is not None
        main, auxiliary = losses.main.sum(), losses.auxiliary.sum()
        is_last = self.accelerator.sync_gradients
        if isinstance(gate, ZeroGate):
            gate.backward(main, auxiliary, scale_wrt_gas=False)
            return gate.step(boundary=is_last)
        gate.accumulate(self._scaled(main), self._scaled(auxiliary))
        return gate.combine() if is_last else None

    def _two_backward_passes(self) -> AbstractContextManager[Any]:
        """The context in which a graph may be back-propagated twice, where that is needed."""
        is_needed = self._is_exact or self._scoped is not None or self._monitors
        if not (self.args.torch_compile and is_needed):
            return nullcontext()
        from torch._functorch import config

        # A compiled backward pass would reuse the memory that a second one reads.
        return cast(AbstractContextManager[Any], config.patch(donated_buffer=False))

    def _empty_cache(self) -> None:
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            from accelerate.utils.memory import clear_device_cache

            clear_device_cache()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the means of the losses, angles and decisions."""
        if self._objective is not None and "loss" in logs:
            average = partial(self.accelerator.reduce, reduction="mean")
            logs.update(self._gate_log.take(average))
            for monitor in self._monitors:
                logs.update(monitor.take())
        super().log(logs, *args, **kwargs)


def _num_labels(batch: Any) -> Tensor:
    """The number [] of texts of a batch that count; 0 without labels, which are refused later."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        return torch.zeros((), dtype=torch.long)
    return (labels != IGNORED).sum()
