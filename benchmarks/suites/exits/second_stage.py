"""Exits of the second stage trained together, one at a time, and from the feature cache."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ....engine.config.training import TrainingConfig
from ....engine.objectives.losses import ExitLosses
from ....engine.training.builder import build_run
from ....engine.training.metrics_log import MetricsLog
from ....engine.training.storage.checkpoint import save_model
from ....engine.training.trainer import Trainer
from ...floors.matrix_products import PRODUCTS, add_floors, flops_of, product_turn
from ...measuring.clock import quantiles, ratio, seconds
from ...measuring.environment import Result

BATCH_SIZE = 32
# Of MiniLM, for which the rate of matrix products is measured.
WIDTH = 384
STAGES: dict[str, dict[str, Any]] = {
    "mha_acl": {"exit_head": "mha", "objective": "acl", "gate": "angle"},
    "mha_ce": {"exit_head": "mha", "objective": "ce"},
    "linear_acl": {"exit_head": "linear", "objective": "acl", "gate": "angle"},
}
# Steps before the timed ones: the first opens the cache, the second finds memory as it will be.
WARM_UP = 2
# Of the largest value, in float32. Exits apart differ in the order of additions; the cache holds
# half precision, 11 bits, and a gradient adds its errors up. Products in bfloat16 have 8 bits.
MAX_ERROR = {"apart": 1e-4, "cached": 2e-2}
MAX_ERROR_BFLOAT16 = 0.1


class Runs:
    """Training runs of the second stage over one first stage for each kind of exit.

    encoder: name or path of the backbone; num_batches: of an epoch, full ones.
    num_layers: the backbone's first ones only. data: options that say on which texts.
    """

    def __init__(
        self,
        directory: Path,
        encoder: str,
        num_batches: int,
        num_layers: int | None = None,
        **data: Any,
    ) -> None:
        self.directory = directory
        self.encoder = encoder
        self.num_batches = num_batches
        self.num_layers = num_layers
        self.data = data
        self._first: dict[str, SteppedTrainer] = {}

    def first_stage(self, head: str) -> "SteppedTrainer":
        """The encoder with new exits, saved: how well its last exit does costs no time."""
        if head not in self._first:
            options = {
                "model_name_or_path": self.encoder,
                "exit_head": head,
                "num_hidden_layers": self.num_layers,
            }
            trainer = SteppedTrainer(self._config(f"first_{head}", options))
            save_model(self._model(head), trainer.model, trainer.tokenizer)
            self._first[head] = trainer
        return self._first[head]

    def second_stage(self, name: str, options: dict[str, Any]) -> "SteppedTrainer":
        """A run of all exits, or of those that `options` names."""
        self.first_stage(options["exit_head"])
        stage1 = str(self._model(options["exit_head"]))
        return SteppedTrainer(self._config(name, {"stage1_model": stage1, **options}))

    def cached(self, options: dict[str, Any]) -> "SteppedTrainer":
        """A run of all exits from the cache that this kind of exit needs."""
        bits = 16 if options.get("bf16") else 32
        cache = self.directory / f"cache_{options['exit_head']}_{bits}"
        return self.second_stage("cached", {**options, "feature_cache": str(cache)})

    def apart(self, options: dict[str, Any]) -> list["SteppedTrainer"]:
        """A run for each exit before the last, which is their teacher."""
        *layers, last = self.first_stage(options["exit_head"]).model.exit_layers
        return [
            self.second_stage(f"apart_{layer}", {**options, "exit_layers": f"{layer},{last}"})
            for layer in layers
        ]

    def _model(self, head: str) -> Path:
        return self.directory / f"model_{head}"

    def _config(self, name: str, options: dict[str, Any]) -> TrainingConfig:
        return TrainingConfig.create(
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


class SteppedTrainer(Trainer):
    """A trainer that goes on by one step at a call."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(build_run(config))
        # Nobody else knows its directory; the next kind of exit has one of the same name.
        self.parts.lock.release()
        self._steps: Iterator[None] | None = None

    def one_step(self) -> None:
        """The next step of the run, as `run` does it."""
        if self._steps is None:
            self._steps = self._all_steps()
        next(self._steps)

    def _all_steps(self) -> Iterator[None]:
        with MetricsLog(self.output_dir, "none") as log, tqdm(disable=True) as bar:
            yield from self.steps(log, bar)

    def losses_of(self, indices: np.ndarray) -> ExitLosses:
        """Of one batch, with their graph."""
        (losses,) = self.losses.of(1, [indices])
        return losses


def second_stage(runs: Runs, name: str, bf16: bool = False) -> Result:
    """Milliseconds a batch of the three ways, which take turns on the batches of an epoch."""
    options = STAGES[name] | ({"bf16": True} if bf16 else {})
    check(runs, name, options)
    # The order of an epoch is the seed's, so these are the batches that are timed.
    flops = {
        contestant: _mean_flops(trainers, runs.num_batches)
        for contestant, trainers in _contestants(runs, options).items()
    }
    contestants = _contestants(runs, options)
    turns: dict[str, Callable[[], object]] = {
        name: partial(_one_batch, trainers) for name, trainers in contestants.items()
    }
    turns[PRODUCTS] = product_turn(WIDTH, torch.bfloat16 if bf16 else torch.float32)
    samples: dict[str, list[float]] = {contestant: [] for contestant in turns}
    for number in tqdm(range(WARM_UP + runs.num_batches), desc=name, leave=False):
        for contestant, turn in turns.items():
            took = seconds(turn)
            if number >= WARM_UP:
                samples[contestant].append(took)
    times = {contestant: quantiles(values) for contestant, values in samples.items()}
    totals = {contestant: sum(values) for contestant, values in samples.items()}
    (together,) = contestants["together"]
    rate = add_floors(times, flops, WIDTH)
    result = {
        "options": options,
        "exits": len(contestants["apart"]),
        "mean_tokens": float(together.train_split.lengths.mean()),
        **rate,
        "times": times,
        "faster_than_apart": ratio(times, "apart", "together"),
        "cached_faster": ratio(times, "together", "cached"),
        # Of the sums over the same batches, which are of different lengths.
        "total_faster_than_apart": totals["apart"] / totals["together"],
        "total_cached_faster": totals["together"] / totals["cached"],
    }
    print(
        f"{name}{' bf16' if bf16 else ''}: {len(contestants['apart'])} exits together "
        f"{times['together']['p50_ms']:.0f} ms a batch, {result['faster_than_apart']:.2f}x faster "
        f"than one at a time (sums: {result['total_faster_than_apart']:.2f}); from the cache "
        f"{times['cached']['p50_ms']:.0f} ms, {result['cached_faster']:.2f}x faster than without "
        f"(sums: {result['total_cached_faster']:.2f})"
    )
    return result


def _contestants(runs: Runs, options: dict[str, Any]) -> dict[str, list["SteppedTrainer"]]:
    """New runs of each way, which begin with the same batch."""
    return {
        "together": [runs.second_stage("together", options)],
        "apart": runs.apart(options),
        "cached": [runs.cached(options)],
    }


def _one_batch(trainers: Sequence["SteppedTrainer"]) -> None:
    for trainer in trainers:
        trainer.one_step()


def _mean_flops(trainers: Sequence["SteppedTrainer"], num_batches: int) -> int:
    """FLOPs of matrix products a batch, of the batches after those that warm up."""
    for _ in range(WARM_UP):
        _one_batch(trainers)

    def batches() -> None:
        for _ in range(num_batches):
            _one_batch(trainers)

    return flops_of(batches, num_batches)


def check(runs: Runs, name: str, options: dict[str, Any]) -> None:
    """Refuses to time what is not the same training: losses and gradients of every exit."""
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
    for contestant, exits in (("apart", apart), ("cached", exit_values(cached, indices))):
        limit = MAX_ERROR_BFLOAT16 if options.get("bf16") else MAX_ERROR[contestant]
        for layer, values, wanted in zip(layers, exits, expected, strict=True):
            for what, value in values.items():
                refuse(f"{name}, {contestant}, exit {layer}, {what}", value, wanted[what], limit)


def exit_values(trainer: SteppedTrainer, indices: np.ndarray) -> list[dict[str, Tensor]]:
    """Of each exit, the losses of a batch and their gradients (flat)."""
    losses = trainer.losses_of(indices)
    found = []
    for index, position in enumerate(trainer.stage.exits):
        parameters = list(trainer.model.exits[position].parameters())
        values = {}
        for what, loss in (("main", losses.main), ("auxiliary", losses.auxiliary)):
            if loss is None:
                continue
            gradients = torch.autograd.grad(
                loss[index], parameters, retain_graph=True, materialize_grads=True
            )
            values[f"{what} loss"] = loss[index].detach()
            values[f"{what} gradient"] = torch.cat([g.reshape(-1) for g in gradients])
        found.append(values)
    return found


def refuse(what: str, found: Tensor, wanted: Tensor, limit: float) -> None:
    """Ends the benchmark where the largest error is beyond `limit` of the largest value."""
    error = float((found - wanted).detach().abs().max() / wanted.detach().abs().max())
    if not error <= limit:
        raise SystemExit(f"{what}: relative error {error:.1e}: not timed")
