"""Inference that lets each text leave at the first exit where the policy is content.

After an exit the batch goes on without the texts that left, and without padding that no remaining
text needs. What is decided on a text does not depend on its batch. Only rounding does: the same
text in another batch has logits that differ in the last bits, so a signal within about 1e-6 of a
threshold (float32; 1e-2 in bfloat16) may fall on either side. Calibrated thresholds lie midway
between observed signals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ..data.batching import EncodedSplit, evaluation_batches
from ..runtime.device import autocast, evaluating
from .encoder_layers import Flops, LayerContext, encoder_layers
from .exit_policies import ExitReading, Memory, Policy, make_policy, stored_policy
from .exits import Exit
from .flops import exit_flops, full_flops

if TYPE_CHECKING:
    from .multi_exit import MultiExitForSequenceClassification

# int64 [N]: places of texts, or their tokens.
Rows = NDArray[np.int64]

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class EarlyExitOutput:
    """n texts, K labels, in the order of the input, on the CPU.

    predictions [n] int64; probabilities [n, K] float32, of the exit where the text left;
    exit_layers [n] int64, the layer of that exit; lengths [n] int64 in tokens;
    costs: layer -> operations on a text that leaves there; full_cost: of `full_flops`.
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
        """Operations of all texts as a share of the full model's; above 1 where few leave early."""
        return float(self.flops.sum() / self.full_cost.at(self.lengths).sum())


@dataclass(frozen=True)
class _Stage:
    """Layers up to the next exit that the policy reads, and that exit."""

    layers: range
    head: Exit


@dataclass
class _Flight:
    """Texts under way together. rows [N]: their places in the answer; lengths [N]: their tokens.

    What is kept about texts is NumPy's, as in `EncodedSplit`: between two layers an operation of
    PyTorch on a few numbers takes tens of microseconds, its code having left the cache.
    """

    rows: Rows
    lengths: Rows
    hidden: Tensor  # [N, T, H]
    attention_mask: Tensor  # [N, T]
    memory: Memory
    # Made when it is first needed for these rows and this width.
    context: LayerContext | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, keep: Rows) -> _Flight:
        """The texts `keep` (places), no wider than their longest."""
        lengths = self.lengths[keep]
        width = int(lengths.max())
        index = torch.from_numpy(keep).to(self.hidden.device)
        return _Flight(
            self.rows[keep],
            lengths,
            self.hidden[:, :width].index_select(0, index),
            self.attention_mask[:, :width].index_select(0, index),
            {name: value.index_select(0, index) for name, value in self.memory.items()},
        )


def _merged(flights: Sequence[_Flight]) -> _Flight:
    """One flight of several at the same exit, padded to the longest text."""
    if len(flights) == 1:
        return flights[0]
    width = max(flight.hidden.shape[1] for flight in flights)
    missing = [width - flight.hidden.shape[1] for flight in flights]
    pairs = list(zip(flights, missing, strict=True))
    return _Flight(
        np.concatenate([flight.rows for flight in flights]),
        np.concatenate([flight.lengths for flight in flights]),
        torch.cat([functional.pad(flight.hidden, (0, 0, 0, columns)) for flight, columns in pairs]),
        torch.cat(
            [functional.pad(flight.attention_mask, (0, columns)) for flight, columns in pairs]
        ),
        {
            name: torch.cat([flight.memory[name] for flight in flights])
            for name in flights[0].memory
        },
    )


def _full_batches(flights: Sequence[_Flight], batch_size: int | None) -> list[_Flight]:
    """Flights at the same exit as batches of `batch_size`, the last one smaller."""
    if not flights or batch_size is None:
        return list(flights)
    together = _merged(flights)
    if len(together) <= batch_size:
        return [together]
    places = np.arange(len(together))
    return [
        together.select(places[first : first + batch_size])
        for first in range(0, len(together), batch_size)
    ]


class _Answers:
    """Logits and exit layers as texts leave, put in the input's order at the end."""

    def __init__(self, num_rows: int) -> None:
        self.exit_layers = np.zeros(num_rows, dtype=np.int64)
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
        parameters: of a policy given by name.
        dtype: of matrix products under autocast; decisions are on float32 logits in any case.

    Raises:
        ValueError: the model has one exit, stores no policy, lacks the learned exit that the policy
            needs, or its encoder cannot be run layer by layer; a mistake in the policy.
    """

    def __init__(
        self,
        model: MultiExitForSequenceClassification,
        policy: Policy | str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        **parameters: Any,
    ) -> None:
        check_has_earlier_exits(model)
        self.model = model.eval()
        self.policy = _resolve(model, policy, parameters)
        self.policy.check(model.exit_layers)
        self.learned_exit: nn.Linear | None = getattr(model, "learned_exit", None)
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
        """Answers for one batch of right-padded token ids [N, T].

        Raises:
            ValueError: an empty batch, or padding elsewhere than on the right.
        """
        batch = {"input_ids": input_ids}
        if attention_mask is not None:
            batch["attention_mask"] = attention_mask
        if token_type_ids is not None:
            batch["token_type_ids"] = token_type_ids
        num_rows = len(input_ids)
        return self._run(iter([(np.arange(num_rows), batch)]), num_rows, repack_to=None)

    def predict(
        self,
        encoded: EncodedSplit,
        batch_size: int,
        *,
        pad_token_id: int,
        repack: bool = False,
        progress: bool = False,
    ) -> EarlyExitOutput:
        """Answers for a whole split, in its order.

        `repack`: what is left of several batches after an exit goes on together, in full batches.
        """
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
        lengths = np.empty(num_rows, dtype=np.int64)
        device = self.model.device
        with torch.inference_mode(), autocast(device, self.dtype):
            self._run_all(batches, device, answers, lengths, repack_to)
        # A copy made outside: the caller gets tensors like any other.
        logits = answers.logits().clone()
        probabilities = torch.softmax(logits, dim=-1)
        return EarlyExitOutput(
            predictions=logits.argmax(dim=-1),
            probabilities=probabilities,
            exit_layers=torch.from_numpy(answers.exit_layers),
            lengths=torch.from_numpy(lengths),
            costs=self._costs,
            full_cost=self._full_cost,
        )

    def _run_all(
        self,
        batches: Iterable[tuple[Rows, Mapping[str, Tensor]]],
        device: torch.device,
        answers: _Answers,
        lengths: Rows,
        repack_to: int | None,
    ) -> None:
        """Answers all batches; fills in the `lengths` [n] of the texts."""
        waiting: list[list[_Flight]] = [[] for _ in self.stages]
        for rows, batch in batches:
            flight = self._depart(rows, batch, device)
            lengths[rows] = flight.lengths
            if repack_to is None:
                self._fly(flight, answers)
            else:
                self._send(flight, 0, waiting, repack_to, answers)
        for stage, flights in enumerate(waiting):
            for flight in _full_batches(flights, repack_to):
                left = self._advance(flight, stage, answers)
                if left is not None:
                    waiting[stage + 1].append(left)

    def _depart(self, rows: Rows, batch: Mapping[str, Tensor], device: torch.device) -> _Flight:
        """Embeds a batch."""
        input_ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(input_ids)
        lengths = _lengths(mask)
        types = batch.get("token_type_ids")
        mask = mask.to(device)
        hidden = self.layers.embed(
            input_ids.to(device), mask, None if types is None else types.to(device)
        )
        return _Flight(rows, lengths, hidden, mask, {})

    def _fly(self, flight: _Flight, answers: _Answers) -> None:
        """Takes a flight to its end."""
        left: _Flight | None = flight
        stage = 0
        while left is not None:
            left = self._advance(left, stage, answers)
            stage += 1

    def _send(
        self,
        flight: _Flight,
        stage: int,
        waiting: list[list[_Flight]],
        batch_size: int,
        answers: _Answers,
    ) -> None:
        """Takes a flight through `stage`; those left wait for company, a full batch goes on."""
        left = self._advance(flight, stage, answers)
        if left is None:
            return
        stage += 1
        waiting[stage].append(left)
        if sum(map(len, waiting[stage])) < batch_size:
            return
        # Fewer than a batch waited and at most a batch came: one goes on, the rest waits.
        together, *rest = _full_batches(waiting[stage], batch_size)
        waiting[stage] = rest
        self._send(together, stage, waiting, batch_size, answers)

    def _advance(self, flight: _Flight, stage: int, answers: _Answers) -> _Flight | None:
        """Runs the layers of one stage and its exit; returns what stays, None where all left."""
        layers, head = self.stages[stage].layers, self.stages[stage].head
        hidden, mask = flight.hidden, flight.attention_mask
        if flight.context is None:
            padded = int(flight.lengths.min()) < hidden.shape[1]
            flight.context = self.layers.context(hidden, mask, padded)
        for layer in layers:
            hidden = self.layers.run(layer, hidden, flight.context)
        embeddings, logits = head(hidden, mask)
        logits = logits.float()
        exit_layer = layers[-1]
        if stage == len(self.stages) - 1:
            answers.add(flight.rows, logits, exit_layer)
            return None
        certainty = (
            None if self.learned_exit is None else certainty_of(self.learned_exit, embeddings)
        )
        reading = ExitReading(exit_layer, logits, certainty)
        leaving, flight.memory = self.policy.leaves(reading, flight.memory)
        # The one transfer an exit costs: N booleans.
        gone = leaving.cpu().numpy()
        num_leaving = np.count_nonzero(gone)
        flight.hidden = hidden
        if num_leaving == 0:
            return flight
        if num_leaving == len(flight):
            answers.add(flight.rows, logits, exit_layer)
            return None
        places = torch.from_numpy(np.flatnonzero(gone)).to(logits.device)
        answers.add(flight.rows[gone], logits.index_select(0, places), exit_layer)
        return flight.select(np.flatnonzero(~gone))


def early_exit(
    model: MultiExitForSequenceClassification,
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
    """Answers of a multi-exit model, each text leaving where the policy lets it.

        batch = tokenizer(texts, padding=True, return_tensors="pt")
        early_exit(model, batch, "entropy", threshold=0.2).predictions

    Args:
        inputs: one batch (input_ids, attention_mask, token_type_ids), run as it is, or an encoded
            split, run in batches of `batch_size`.
        policy, parameters, dtype: as for `EarlyExit`.
        pad_token_id: for an encoded split; None: the encoder's.
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
                raise ValueError("pad_token_id is missing: the encoder's configuration has none.")
            return engine.predict(
                inputs, batch_size, pad_token_id=pad_token_id, repack=repack, progress=progress
            )
        return engine(**_checked_inputs(inputs))


def check_has_earlier_exits(model: MultiExitForSequenceClassification) -> None:
    """Refuse a model that nothing can leave early.

    Raises:
        ValueError: it has one exit.
    """
    if len(model.exit_layers) < 2:
        raise ValueError(
            f"The model has one exit, on layer {model.exit_layers[0]}: nothing can leave early. "
            "Train with exits on several layers (--exit_layers)."
        )


def certainty_of(learned_exit: nn.Linear, embeddings: Tensor) -> Tensor:
    """The probability [N] that the exit which read `embeddings` [N, d] answers right; float32."""
    # Not a matrix product, which autocast would compute in half precision.
    score = (embeddings.float() * learned_exit.weight[0].float()).sum(dim=-1)
    return torch.sigmoid(score + learned_exit.bias.float())


def _checked_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "input_ids" not in inputs:
        raise ValueError(f"inputs has no input_ids; it has {', '.join(inputs) or 'nothing'}.")
    unknown = [name for name in inputs if name not in (*_INPUTS, "labels")]
    if unknown:
        raise ValueError(f"inputs: early exit takes {', '.join(_INPUTS)}, not {unknown[0]!r}.")
    return {name: inputs[name] for name in _INPUTS if name in inputs}


def _stages(model: MultiExitForSequenceClassification, policy: Policy) -> list[_Stage]:
    stages = []
    first = 1
    for layer, head in zip(model.exit_layers, model.exits, strict=True):
        if policy.reads(layer) or layer == model.exit_layers[-1]:
            stages.append(_Stage(range(first, layer + 1), cast(Exit, head)))
            first = layer + 1
    return stages


def _lengths(attention_mask: Tensor) -> Rows:
    """Tokens of each right-padded text, int64 [N].

    Raises:
        ValueError: no text, a text without a token, or padding before a token.
    """
    # NumPy has no bfloat16, which a mask may be in.
    mask = attention_mask.bool().cpu().numpy()
    if mask.shape[0] == 0:
        raise ValueError("input_ids has no rows: there is nothing to predict.")
    # In a right-padded mask, no 1 follows a 0.
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(
            "attention_mask: padding must be on the right of each text, which has a token at least "
            "(tokenizer.padding_side = 'right')."
        )
    lengths: Rows = mask.sum(axis=1, dtype=np.int64)
    return lengths


def _resolve(
    model: MultiExitForSequenceClassification,
    policy: Policy | str | None,
    parameters: Mapping[str, Any],
) -> Policy:
    if isinstance(policy, str):
        return make_policy(policy, **parameters)
    if parameters:
        raise ValueError(
            f"{', '.join(parameters)}: parameters go with a policy's name; this policy has its own."
        )
    return stored_policy(model) if policy is None else policy
