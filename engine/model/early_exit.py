"""Inference in which each text leaves at the first exit whose answer the policy accepts.

After an exit the batch goes on without the texts that left, and without padding that no remaining
text needs. The decision on a text does not depend on the other texts in its batch, except through
rounding: its logits differ in the last bits from batch to batch, so a signal within about 1e-6 of a
threshold (float32; 1e-2 in bfloat16) may fall on either side. Calibrated thresholds lie midway
between observed signals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batching import EncodedSplit, evaluation_batches
from ..runtime.device import autocast, evaluating
from .active_batch import ActiveBatch, Rows, regroup, token_counts
from .answers import answers_of, has_several_labels, probabilities_of
from .encoder import fitting_token_types
from .encoder_layers import Flops
from .exit_policies import ExitReading, Policy, make_policy, stored_policy
from .exits import Exit, ExitModel
from .flops import exit_flops, full_flops
from .generic_layers import encoder_layers

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class EarlyExitOutput:
    """Answers for n texts and K labels, in the order of the input, on the CPU.

    predictions [n] int64, or the labels that apply, bool [n, K], where a text may have several;
    probabilities [n, K] float32, from the exit where the text left;
    exit_layers [n] int64, the layer of that exit; lengths [n] int64, in tokens;
    costs: layer -> operations on a text that leaves there; full_cost: those of the full model.
    """

    predictions: Tensor
    probabilities: Tensor
    exit_layers: Tensor
    lengths: Tensor
    costs: dict[int, Flops]
    full_cost: Flops

    @property
    def flops(self) -> Tensor:
        """Operations spent on each text, float64 [n]."""
        spent = torch.empty(len(self.lengths), dtype=torch.float64)
        for layer, cost in self.costs.items():
            here = self.exit_layers == layer
            spent[here] = cost.at(self.lengths[here])
        return spent

    @property
    def mean_layer(self) -> float:
        """Layers run per text, on average."""
        return float(self.exit_layers.double().mean())

    @property
    def flops_share(self) -> float:
        """Operations on all texts as a share of the full model's; above 1 if few leave early."""
        return float(self.flops.sum() / self.full_cost.at(self.lengths).sum())


@dataclass(frozen=True)
class _Stage:
    """The layers up to the next exit that the policy reads, and that exit."""

    layers: range
    head: Exit


class _Answers:
    """Logits and exit layers as texts leave, put in the input's order at the end."""

    def __init__(self, num_rows: int) -> None:
        self.exit_layers = np.zeros(num_rows, dtype=np.int64)
        self.lengths = np.empty(num_rows, dtype=np.int64)
        self._rows: list[Rows] = []
        self._logits: list[Tensor] = []

    def add(self, rows: Rows, logits: Tensor, layer: int) -> None:
        self.exit_layers[rows] = layer
        self._rows.append(rows)
        self._logits.append(logits)

    def logits(self) -> Tensor:
        """[n, K] on the CPU, by one transfer."""
        left = torch.cat(self._logits).cpu()
        places = np.concatenate(self._rows).argsort()
        return left[torch.from_numpy(places)]


class EarlyExit:
    """A model with its policy, ready to serve: call it with a batch, or `predict` a whole split.

    Args:
        model: a multi-exit model; it is put into evaluation mode.
        policy: a `Policy`, its name with `parameters`, or None: the one stored with the model.
        parameters: parameters of a policy given by name.
        dtype: dtype of matrix products under autocast; decisions always use float32 logits.

    Raises:
        ValueError: the model has one exit, stores no policy, lacks the learned exit that the policy
            needs; a mistake in the policy.
    """

    def __init__(
        self,
        model: ExitModel,
        policy: Policy | str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        **parameters: Any,
    ) -> None:
        check_has_earlier_exits(model)
        self.model = model.eval()
        self.policy = _resolve(model, policy, parameters)
        self.several = has_several_labels(model.config)
        self.policy.check(model.exit_layers, self.several)
        self.learned_exit = model.learned_exit
        if not self.policy.needs_learned_exit:
            self.learned_exit = None
        elif self.learned_exit is None:
            raise ValueError(
                f"The policy {self.policy.name} needs the model's learned exit, which has not been "
                f"trained: run `fusedacl exits` with --policy {self.policy.name}."
            )
        self.dtype = dtype
        self.layers = encoder_layers(model.backbone)
        self.stages = _stages(model, self.policy)
        costs = exit_flops(model, self.policy)
        self._costs = dict(zip(model.exit_layers, costs, strict=True))
        self._full_cost = full_flops(model)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> EarlyExitOutput:
        """Answer one batch of right-padded token ids [N, T].

        Raises:
            ValueError: an empty batch, tensors of other shapes, or padding elsewhere than on the
                right.
        """
        tensors = zip(_INPUTS, (input_ids, attention_mask, token_type_ids), strict=True)
        batch = {name: tensor for name, tensor in tensors if tensor is not None}
        _check_shapes(batch)
        num_rows = len(input_ids)
        return self._run([(np.arange(num_rows), batch)], num_rows, repack_to=None)

    def predict(
        self,
        encoded: EncodedSplit,
        batch_size: int,
        *,
        pad_token_id: int,
        repack: bool = False,
        progress: bool = False,
    ) -> EarlyExitOutput:
        """Answer a whole split, in its order.

        `repack`: after an exit, the remaining texts of several batches go on in full batches.

        Raises:
            ValueError: `repack`, and the encoder's answers depend on the batch.
        """
        if repack and self.layers.depends_on_batch:
            model_type = self.model.backbone.config.model_type
            raise ValueError(
                f"repack: the answers of a {model_type} encoder depend on the texts that share its "
                "batch. Leave repack out."
            )
        batches = evaluation_batches(
            encoded, batch_size, pad_token_id, progress="predict" if progress else None
        )
        return self._run(batches, len(encoded), repack_to=batch_size if repack else None)

    def _run(
        self,
        batches: Iterable[tuple[Rows, Mapping[str, Tensor]]],
        num_rows: int,
        repack_to: int | None,
    ) -> EarlyExitOutput:
        if self.model.training:
            self.model.eval()
        answers = _Answers(num_rows)
        # Texts that passed stage i - 1 and wait in front of stage i for a full batch.
        waiting: list[list[ActiveBatch]] = [[] for _ in self.stages]
        with torch.inference_mode(), autocast(self.model.device, self.dtype):
            for rows, inputs in batches:
                batch = self._embed(rows, inputs)
                answers.lengths[rows] = batch.lengths
                self._run_stages(batch, waiting, repack_to, answers)
            if repack_to is not None:
                for stage, left in enumerate(waiting):
                    for batch in regroup(left, repack_to):
                        staying = self._run_stage(batch, stage, answers)
                        if staying is not None:
                            waiting[stage + 1].append(staying)
        # Copied outside inference mode: the caller gets ordinary tensors.
        logits = answers.logits().clone()
        return EarlyExitOutput(
            predictions=answers_of(logits, self.several),
            probabilities=probabilities_of(logits, self.several),
            exit_layers=torch.from_numpy(answers.exit_layers),
            lengths=torch.from_numpy(answers.lengths),
            costs=self._costs,
            full_cost=self._full_cost,
        )

    def _embed(self, rows: Rows, inputs: Mapping[str, Tensor]) -> ActiveBatch:
        """The embeddings of a batch, ready for the first layer."""
        device = self.model.device
        input_ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(input_ids)
        lengths = token_counts(mask)
        input_ids, mask = input_ids.to(device), mask.to(device)
        types = fitting_token_types(self.model.backbone, inputs.get("token_type_ids"))
        types = None if types is None else types.to(device)
        hidden = self.layers.embed(input_ids, mask, types)
        carried = self.layers.carried(input_ids, mask, types)
        return ActiveBatch(rows, lengths, hidden, mask, {}, carried)

    def _run_stages(
        self,
        batch: ActiveBatch,
        waiting: list[list[ActiveBatch]],
        repack_to: int | None,
        answers: _Answers,
    ) -> None:
        """Run stage after stage; with `repack_to`, only as long as there are full batches."""
        for stage, group in enumerate(waiting):
            if stage and repack_to is not None:
                group.append(batch)
                if sum(map(len, group)) < repack_to:
                    return
                # Fewer than a batch waited and at most a batch came: one goes on, the rest waits.
                batch, *rest = regroup(group, repack_to)
                waiting[stage] = rest
            staying = self._run_stage(batch, stage, answers)
            if staying is None:
                return
            batch = staying

    def _run_stage(self, batch: ActiveBatch, stage: int, answers: _Answers) -> ActiveBatch | None:
        """Run the layers of one stage and its exit; return what stays, None where all left."""
        layers, head = self.stages[stage].layers, self.stages[stage].head
        hidden = self.layers.advance(batch, layers)
        embeddings, logits = head(hidden, batch.attention_mask)
        logits = logits.float()
        exit_layer = layers[-1]
        if stage == len(self.stages) - 1:
            answers.add(batch.rows, logits, exit_layer)
            return None
        certainty = (
            None if self.learned_exit is None else certainty_of(self.learned_exit, embeddings)
        )
        reading = ExitReading(exit_layer, logits, certainty, self.several)
        leaving, batch.memory = self.policy.leaves(reading, batch.memory)
        # The only transfer to the host at an exit: N booleans.
        gone = leaving.cpu().numpy()
        num_leaving = np.count_nonzero(gone)
        batch.hidden = hidden
        if num_leaving == 0:
            return batch
        if num_leaving == len(batch):
            answers.add(batch.rows, logits, exit_layer)
            return None
        places = torch.from_numpy(np.flatnonzero(gone)).to(logits.device)
        answers.add(batch.rows[gone], logits.index_select(0, places), exit_layer)
        return batch.select(np.flatnonzero(~gone), cut=not self.layers.depends_on_batch)


def early_exit(
    model: ExitModel,
    inputs: Mapping[str, Tensor] | EncodedSplit,
    policy: Policy | str | None = None,
    *,
    batch_size: int = 64,
    pad_token_id: int | None = None,
    repack: bool = False,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    **parameters: Any,
) -> EarlyExitOutput:
    """Answer with a multi-exit model; each text leaves at the first exit that the policy accepts.

        batch = tokenizer(texts, padding=True, return_tensors="pt")
        early_exit(model, batch, "entropy", threshold=0.2).predictions

    Args:
        inputs: one batch (input_ids, attention_mask, token_type_ids), run as it is, or an encoded
            split, run in batches of `batch_size`.
        policy, parameters, dtype: as for `EarlyExit`.
        pad_token_id: padding token for an encoded split; None: the encoder's.
        repack: see `EarlyExit.predict`.

    Raises:
        ValueError: as `EarlyExit`.
    """
    with evaluating(model):
        engine = EarlyExit(model, policy, dtype=dtype, **parameters)
        if isinstance(inputs, EncodedSplit):
            if pad_token_id is None:
                pad_token_id = cast(int | None, model.config.backbone_config.pad_token_id)
            if pad_token_id is None:
                raise ValueError(
                    "pad_token_id is missing, also in the encoder's configuration: pass "
                    "tokenizer.pad_token_id."
                )
            return engine.predict(
                inputs, batch_size, pad_token_id=pad_token_id, repack=repack, progress=progress
            )
        return engine(**_checked_inputs(inputs))


def check_has_earlier_exits(model: ExitModel) -> None:
    """Refuse a model that no text can leave early.

    Raises:
        ValueError: it has one exit.
    """
    if len(model.exit_layers) < 2:
        raise ValueError(
            f"The model has one exit, on layer {model.exit_layers[0]}: nothing can leave early. "
            "Train with exits on several layers (--exit_layers)."
        )


def certainty_of(learned_exit: nn.Linear, embeddings: Tensor) -> Tensor:
    """Probability [N], float32, that the exit's answer from `embeddings` [N, d] is correct."""
    weight, bias = cast(Any, learned_exit.weight), cast(Any, learned_exit.bias)
    if callable(weight):  # of a layer that PyTorch has quantised
        weight, bias = weight().dequantize(), bias()
    # Not a matrix product: autocast would compute that in half precision.
    score = (embeddings.float() * weight[0].float()).sum(dim=-1)
    return torch.sigmoid(score + bias.float())


def _checked_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "input_ids" not in inputs:
        raise ValueError(f"inputs has no input_ids; it has {', '.join(inputs) or 'nothing'}.")
    unknown = [name for name in inputs if name not in (*_INPUTS, "labels")]
    if unknown:
        raise ValueError(f"inputs: early exit takes {', '.join(_INPUTS)}, not {unknown[0]!r}.")
    return {name: inputs[name] for name in _INPUTS if name in inputs}


def _check_shapes(batch: Mapping[str, Tensor]) -> None:
    shape = batch["input_ids"].shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {list(shape)}: it must be [texts, tokens], with at least one "
            "token. Put a single text into a batch of one (input_ids[None])."
        )
    for name, tensor in batch.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, input_ids {list(shape)}: pass both as the "
                "tokenizer gives them."
            )


def _stages(model: ExitModel, policy: Policy) -> list[_Stage]:
    stages = []
    first = 1
    for layer, head in zip(model.exit_layers, model.exits.heads, strict=True):
        if policy.reads(layer) or layer == model.exit_layers[-1]:
            stages.append(_Stage(range(first, layer + 1), head))
            first = layer + 1
    return stages


def _resolve(
    model: ExitModel,
    policy: Policy | str | None,
    parameters: Mapping[str, Any],
) -> Policy:
    if isinstance(policy, str):
        return make_policy(policy, **parameters)
    if parameters:
        raise ValueError(
            f"{', '.join(parameters)}: parameters need a policy's name (policy='entropy'). A "
            "Policy and the stored policy have their own: leave these out, or name a policy."
        )
    return stored_policy(model) if policy is None else policy
