"""The best checkpoint of a run: by which score, and which one it is so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...config.sections import RunOptions
from ...runtime.text import did_you_mean


class BestModel:
    """The step with the best score among those that are evaluated and saved; the first of equals.

    Args:
        options: load_best_model_at_end is on.
        metrics: names that evaluations report beside `loss`.
        layers: of the exits whose scores count, by their mean.

    Raises:
        ValueError: metric_for_best_model is none of them.
    """

    def __init__(self, options: RunOptions, metrics: Sequence[str], layers: Sequence[int]) -> None:
        # transformers has both spellings.
        self.metric = (options.metric_for_best_model or "loss").removeprefix("eval_")
        known = [*metrics, "loss"]
        if self.metric not in known:
            raise ValueError(
                f"metric_for_best_model={options.metric_for_best_model!r} is not reported for "
                f"these data.{did_you_mean(self.metric, known)}"
            )
        greater = options.greater_is_better
        self.greater = self.metric != "loss" if greater is None else greater
        self.layers = list(layers)
        self.step: int | None = None
        self.value: float | None = None

    def consider(self, step: int, by_layer: Mapping[int, Mapping[str, float]]) -> None:
        """Take the step for the best if its scores (layer -> metrics) beat all before."""
        value = sum(by_layer[layer][self.metric] for layer in self.layers) / len(self.layers)
        if not math.isfinite(value):
            return
        if self.value is None or (value > self.value if self.greater else value < self.value):
            self.step, self.value = step, value

    def result(self) -> dict[str, Any]:
        """For results.json."""
        return {"step": self.step, "metric": self.metric, "value": self.value}

    def state_dict(self) -> dict[str, Any]:
        return {**self.result(), "greater": self.greater}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from `state_dict`; None, or another order's: nothing is known of earlier steps."""
        order = (self.metric, self.greater)
        if state is not None and (state["metric"], state["greater"]) == order:
            self.step, self.value = state["step"], state["value"]


def scored_layers(exit_layers: Sequence[int], trained: Sequence[int]) -> list[int]:
    """Layers whose scores choose the best model: the last exit's, where it is trained.

    In the second stage of two_stage it rests, and all the exits that are trained count.

    Args:
        exit_layers: layer of each exit.
        trained: positions, in it, of the exits that the last stage trains.
    """
    last = len(exit_layers) - 1
    positions = [last] if last in trained else trained
    return [exit_layers[position] for position in positions]
