"""The score of an evaluation, by which the best checkpoint is chosen and a stage is ended early."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...config.run_options import RunOptions
from ...data.dataset import TextData
from ...runtime.text import did_you_mean
from ..stages import StepPlan

logger = logging.getLogger("fusedacl")
Scores = Mapping[int, Mapping[str, float]]  # layer -> metrics


def check_scores(options: RunOptions, data: TextData, plan: StepPlan) -> None:
    """Refuse options that need scores if no split has labels; warn if they have nothing to choose.

    Raises:
        ValueError: naming the option.
    """
    num_steps = plan.num_steps - plan.start(len(plan.stages) - 1)
    evaluated = options.eval_steps or plan.steps_per_epoch
    saved = options.save_steps or plan.steps_per_epoch
    for name, every in (
        ("load_best_model_at_end", max(evaluated, saved)), ("early_stopping_patience", evaluated)
    ):  # fmt: skip
        if not getattr(options, name):
            continue
        if not data.evaluation_splits:
            raise ValueError(f"{name}: {data.name} has no labelled split to choose by.")
        if every >= num_steps:
            logger.warning(
                f"{name} has no effect: the first evaluation to choose by is that after the last "
                f"of {num_steps} steps. Lower eval_steps and save_steps, or train for more epochs."
            )


class Score:
    """The number that an evaluation is judged by.

    Args:
        options: with `metric_for_best_model` and `greater_is_better`.
        metrics: names of the metrics that evaluations report besides `loss`.
        exit_layers: the layer of each exit.
        trained: positions in `exit_layers` of the exits that the stage trains. The last exit's
            score counts if it is trained, else the mean score of all that are.

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
        self.value: float | None = None

    def of(self, by_layer: Scores) -> float:
        """The score of an evaluation."""
        return sum(by_layer[layer][self.metric] for layer in self.layers) / len(self.layers)

    def gain(self, value: float) -> float:
        """The lead of a score over the best so far; infinite for the first one."""
        if self.value is None:
            return math.inf
        return value - self.value if self.greater else self.value - value

    def belongs(self, state: Mapping[str, Any] | None) -> bool:
        """True if a saved state is of this metric and order."""
        order = (self.metric, self.greater)
        return state is not None and (state["metric"], state["greater"]) == order


class BestModel(Score):
    """Keeps the step with the best score among those evaluated and saved; the first of equals.

    Args: as for `Score`.
    """

    step: int | None = None

    def consider(self, step: int, by_layer: Scores) -> None:
        """Keep the step if its scores are better than all before."""
        value = self.of(by_layer)
        if math.isfinite(value) and self.gain(value) > 0:
            self.step, self.value = step, value

    def result(self) -> dict[str, Any]:
        """The entry for results.json."""
        return {"step": self.step, "metric": self.metric, "value": self.value}

    def state_dict(self) -> dict[str, Any]:
        return {**self.result(), "greater": self.greater}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore `state_dict`; None, or one of another metric or order, is ignored."""
        if state is not None and self.belongs(state):
            self.step, self.value = state["step"], state["value"]


class EarlyStopping(Score):
    """Counts the evaluations of a stage in a row that were not better than the best before.

    As in transformers' EarlyStoppingCallback, better is by more than the threshold, and the best
    score moves with every gain.

    Args: as for `Score`; options: with `early_stopping_patience` and `early_stopping_threshold`.
    """

    def __init__(self, options: RunOptions, *which: Any) -> None:
        super().__init__(options, *which)
        assert options.early_stopping_patience is not None
        self.patience = options.early_stopping_patience
        self.threshold = options.early_stopping_threshold
        self.num_without = 0

    @property
    def is_over(self) -> bool:
        """True if the stage ends."""
        return self.num_without >= self.patience

    def consider(self, by_layer: Scores) -> None:
        """Count an evaluation."""
        value = self.of(by_layer)
        gain = self.gain(value)
        self.num_without = 0 if gain > self.threshold else self.num_without + 1
        if gain > 0 and math.isfinite(value):
            self.value = value

    def state_dict(self) -> dict[str, Any]:
        order = {"metric": self.metric, "greater": self.greater}
        return {**order, "value": self.value, "num_without": self.num_without}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore `state_dict`; None, or one of another metric or order, is ignored."""
        if state is not None and self.belongs(state):
            self.value, self.num_without = state["value"], state["num_without"]
