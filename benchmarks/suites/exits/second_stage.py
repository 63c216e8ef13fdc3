"""Second-stage training: all exits together, one at a time, and from the feature cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ....engine.config.training import TrainingConfig
from ....engine.runtime.text import text_table
from ....engine.training.builder import build_run
from ....engine.training.logs.metrics_log import MetricsLog
from ....engine.training.storage.checkpoint import save_model
from ....engine.training.trainer import Trainer
from ...floors.matrix_products import PRODUCTS, add_floors, flops_of, product_turn
from ...measuring.clock import quantiles, seconds
from ...measuring.environment import Result
from ...measuring.times_table import times_table
from ..suite import WrongResult, flat_gradient, relative_error

BATCH_SIZE = 32
# Width of MiniLM, at which the rate of matrix products is measured.
WIDTH = 384
STAGES: dict[str, dict[str, Any]] = {
    "mha_acl": {"exit_head": "mha", "objective": "acl", "gate": "angle"},
    "mha_ce": {"exit_head": "mha", "objective": "ce"},
    "linear_acl": {"exit_head": "linear", "objective": "acl", "gate": "angle"},
}
# Untimed steps: the first one opens the cache, by the second one memory is allocated.
WARM_UP = 2
# Relative to the largest value, in float32. Exits trained one at a time differ in the order of
# additions; the cache stores float16 (11 bits), whose errors add up in a gradient.
MAX_ERROR = {"apart": 1e-4, "cached": 2e-2}
# bfloat16 has 8 bits.
MAX_ERROR_BFLOAT16 = 0.1


@dataclass(frozen=True)
class Runs:
    """Second-stage runs on one first-stage model for each kind of exit.

    encoder: name or path of the backbone. num_batches: full batches per epoch. data: options that
    select the texts. num_layers: number of first layers to keep, None for all.
    """

    directory: Path
    encoder: str
    num_batches: int
    data: dict[str, str]
    num_layers: int | None = None
    _first: dict[str, "SteppedTrainer"] = field(default_factory=dict)

    def first_stage(self, head: str) -> "SteppedTrainer":
        """A saved encoder with untrained exits: accuracy does not affect the times."""
        if head not in self._first:
            trainer = self._trainer(
                f"first_{head}", model_name_or_path=self.encoder, exit_head=head,
                num_hidden_layers=self.num_layers,
            )  # fmt: skip
            save_model(self.directory / f"model_{head}", trainer.model, trainer.tokenizer)
            self._first[head] = trainer
        return self._first[head]

    def second_stage(self, name: str, options: dict[str, Any]) -> "SteppedTrainer":
        """A run that trains all exits, or those that `options` name."""
        self.first_stage(options["exit_head"])
        stage1 = self.directory / f"model_{options['exit_head']}"
        return self._trainer(name, stage1_model=str(stage1), **options)

    def cached(self, options: dict[str, Any]) -> "SteppedTrainer":
        """A run that trains all exits from a feature cache."""
        bits = 16 if options.get("bf16") else 32
        cache = self.directory / f"cache_{options['exit_head']}_{bits}"
        return self.second_stage("cached", {**options, "feature_cache": str(cache)})

    def apart(self, options: dict[str, Any]) -> list["SteppedTrainer"]:
        """One run per exit before the last one, which is the teacher of all."""
        *layers, last = self.first_stage(options["exit_head"]).model.exit_layers
        return [
            self.second_stage(f"apart_{layer}", {**options, "exit_layers": f"{layer},{last}"})
            for layer in layers
        ]

    def _trainer(self, name: str, **options: Any) -> "SteppedTrainer":
        config = TrainingConfig.create(
            **self.data,
            **options,
            strategy="two_stage",
            contrastive_reduction="sum",
            per_device_train_batch_size=BATCH_SIZE,
            max_train_samples=self.num_batches * BATCH_SIZE,
            output_dir=str(self.directory / name),
            overwrite_output_dir=True,
            save_steps=0,
            disable_tqdm=True,
            device="cpu",
        )
        return SteppedTrainer(config)


class SteppedTrainer(Trainer):
    """A trainer that takes one step per call."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(build_run(config))
        # No other process uses the directory; the next kind of exit uses the same one again.
        self.parts.lock.release()
        self._steps = self._all_steps()

    def one_step(self) -> None:
        """Take the next step of the run, as `run` does it."""
        next(self._steps)

    def _all_steps(self) -> Iterator[None]:
        with MetricsLog(self.output_dir) as log, tqdm(disable=True) as bar:
            yield from self.steps(log, bar)


def second_stage(runs: Runs, name: str, bf16: bool = False) -> Result:
    """Time the three ways of training in turns, over the batches of one epoch."""
    options = STAGES[name] | ({"bf16": True} if bf16 else {})
    check(runs, name, options)
    # The seed fixes the order of an epoch, so these are also the batches that are timed.
    flops = {
        way: _mean_flops(trainers, runs.num_batches)
        for way, trainers in _ways(runs, options).items()
    }
    ways = _ways(runs, options)
    turns: dict[str, Callable[[], object]] = {
        name: partial(_train, trainers) for name, trainers in ways.items()
    }
    turns[PRODUCTS] = product_turn(WIDTH, torch.bfloat16 if bf16 else torch.float32)
    samples: dict[str, list[float]] = {way: [] for way in turns}
    for number in tqdm(range(WARM_UP + runs.num_batches), desc=name, leave=False):
        for way, turn in turns.items():
            took = seconds(turn)
            if number >= WARM_UP:
                samples[way].append(took)
    times = {way: quantiles(values) for way, values in samples.items()}
    totals = {way: sum(values) for way, values in samples.items()}
    rate = add_floors(times, flops, WIDTH)
    print(f"\n{name}{' bf16' if bf16 else ''}, per batch", times_table(times, text_table), sep="\n")
    return {
        "options": options,
        "exits": len(ways["apart"]),
        "mean_tokens": float(ways["together"][0].train_split.lengths.mean()),
        **rate,
        "times": times,
        # Sums over the same batches, whose lengths differ.
        "total_faster_than_apart": totals["apart"] / totals["together"],
        "total_cached_faster": totals["together"] / totals["cached"],
    }


def _ways(runs: Runs, options: dict[str, Any]) -> dict[str, list["SteppedTrainer"]]:
    """New runs of each way of training, which start with the same batch."""
    return {
        "together": [runs.second_stage("together", options)],
        "apart": runs.apart(options),
        "cached": [runs.cached(options)],
    }


def _mean_flops(trainers: Sequence[SteppedTrainer], num_batches: int) -> int:
    """Mean FLOP of matrix products per batch, after the warm-up batches."""

    _train(trainers, WARM_UP)
    return flops_of(partial(_train, trainers, num_batches), num_batches)


def _train(trainers: Sequence[SteppedTrainer], num_batches: int = 1) -> None:
    for _ in range(num_batches):
        for trainer in trainers:
            trainer.one_step()


def check(runs: Runs, name: str, options: dict[str, Any]) -> None:
    """Compare losses and gradients of every exit between the three ways (WrongResult)."""
    options = {**options, "dropout": 0.0}
    together, cached = runs.second_stage("together", options), runs.cached(options)
    cached.model.load_state_dict(together.model.state_dict())
    layers = together.model.exit_layers[:-1]
    indices = np.arange(BATCH_SIZE)
    expected = exit_values(together, indices)
    apart = []
    for position, alone in enumerate(runs.apart(options)):
        alone.model.exits[0].load_state_dict(together.model.exits[position].state_dict())
        apart += exit_values(alone, indices)
    for way, exits in (("apart", apart), ("cached", exit_values(cached, indices))):
        limit = MAX_ERROR_BFLOAT16 if options.get("bf16") else MAX_ERROR[way]
        for layer, values, wanted in zip(layers, exits, expected, strict=True):
            for what, value in values.items():
                compare(f"{name}, {way}, exit {layer}, {what}", value, wanted[what], limit)


def exit_values(trainer: SteppedTrainer, indices: np.ndarray) -> list[dict[str, Tensor]]:
    """Losses of a batch and their flat gradients, for each exit."""
    (losses,) = trainer.losses.of(1, 1, [indices])
    found = []
    for index, position in enumerate(trainer.stage.exits):
        parameters = list(trainer.model.exits[position].parameters())
        values = {}
        for what, loss in (("main", losses.main), ("auxiliary", losses.auxiliary)):
            if loss is not None:
                values[f"{what} loss"] = loss[index].detach()
                values[f"{what} gradient"] = flat_gradient(loss[index], parameters)
        found.append(values)
    return found


def compare(what: str, found: Tensor, wanted: Tensor, limit: float) -> None:
    """WrongResult if the largest error exceeds `limit` times the largest wanted value."""
    error = relative_error(found, wanted)
    if not error <= limit:
        raise WrongResult(f"{what}: relative error {error:.1e}: not timed")
