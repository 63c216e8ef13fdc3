"""The choice of the best checkpoint of a run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...config.sections import RunOptions
from ...runtime.text import did_you_mean


class BestModel:
    """Keeps the step with the best score among those evaluated and saved; the first of equals.

    Args:
        options: with load_best_model_at_end.
        metrics: names of the metrics that evaluations report besides `loss`.
        exit_layers: the layer of each exit.
        trained: positions in `exit_layers` of the exits that the last stage trains. The last exit
            chooses the model if it is trained, else the mean score of all that are.

    Raises:
        ValueError: metric_for_best_model is not among the metrics.
    """

    def __init__(
        self,
        options: RunOptions,
        metrics: Sequence[str],
        exit_layers: Sequence[int],
        trained: Sequence[int],
    ) -> None:
        # transformers accepts both spellings.
        self.metric = (options.metric_for_best_model or "loss").removeprefix("eval_")
        known = [*metrics, "loss"]
        if self.metric not in known:
            raise ValueError(
                f"metric_for_best_model={options.metric_for_best_model!r} is not reported for "
                f"these data.{did_you_mean(self.metric, known)}"
            )
        greater = options.greater_is_better
        self.greater = self.metric != "loss" if greater is None else greater
        last = len(exit_layers) - 1
        self.layers = [exit_layers[p] for p in ([last] if last in trained else trained)]
        self.step: int | None = None
        self.value: float | None = None

    def consider(self, step: int, by_layer: Mapping[int, Mapping[str, float]]) -> None:
        """Keep the step if its scores (layer -> metrics) are better than all before."""
        value = sum(by_layer[layer][self.metric] for layer in self.layers) / len(self.layers)
        if not math.isfinite(value):
            return
        if self.value is None or (value > self.value if self.greater else value < self.value):
            self.step, self.value = step, value

    def result(self) -> dict[str, Any]:
        """The entry for results.json."""
        return {"step": self.step, "metric": self.metric, "value": self.value}

    def state_dict(self) -> dict[str, Any]:
        return {**self.result(), "greater": self.greater}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore `state_dict`; None, or one of another metric or order, is ignored."""
        order = (self.metric, self.greater)
        if state is not None and (state["metric"], state["greater"]) == order:
            self.step, self.value = state["step"], state["value"]
