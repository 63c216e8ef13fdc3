"""Options of what a run writes, when, and for whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..runtime.text import did_you_mean
from .fields import option
from .sections import device_option, disable_tqdm_option

SERVICES = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclass(frozen=True)
class RunOptions:
    output_dir: str | None = option(None, "directory for all files of the run")
    overwrite_output_dir: bool = option(False, "delete the contents of --output_dir before the run")
    resume_from_checkpoint: str | None = option(
        None, "checkpoint to continue from: 'latest', or a checkpoint directory in --output_dir"
    )
    logging_steps: int = option(10, "optimizer steps between lines of metrics.jsonl", at_least=1)
    eval_steps: int | None = option(
        None,
        "optimizer steps between evaluations; unset: one evaluation per epoch, 0: at the end only",
        at_least=0,
    )
    save_steps: int | None = option(
        None,
        "optimizer steps between checkpoints; unset: one checkpoint per epoch, 0: none",
        at_least=0,
    )
    save_total_limit: int | None = option(
        2,
        "number of checkpoints to keep; the newest and the best are always kept. none: keep all",
        at_least=1,
    )
    load_best_model_at_end: bool = option(
        False,
        "use the checkpoint with the best score as the final model. The score is the last exit's on"
        " the first evaluation split, in the second stage of two_stage the mean of its exits",
    )
    metric_for_best_model: str | None = option(
        None,
        "score for --load_best_model_at_end and --early_stopping_patience: loss, or a metric of the"
        " task; unset: loss",
    )
    greater_is_better: bool | None = option(
        None,
        "whether a larger --metric_for_best_model is better; unset: true for all metrics but loss",
    )
    profile: int = option(
        0,
        "number of optimizer steps to profile, after 3 steps of warm-up; their time by part is"
        " printed and written to profile.json. 0: no profile",
        at_least=0,
        at_most=50,
    )
    profile_trace: bool = option(
        False, "with --profile: also write trace.json.gz for Perfetto or chrome://tracing"
    )
    early_stopping_patience: int | None = option(
        None,
        "end a stage after this many evaluations in a row without a better score"
        " (--metric_for_best_model); unset: never",
        at_least=1,
    )
    early_stopping_threshold: float = option(
        0.0, "with --early_stopping_patience: how much better a score has to be", at_least=0
    )
    report_to: str = option(
        "none",
        "services that also receive the metrics: tensorboard, wandb, trackio, mlflow, several of"
        " them separated by commas, all (those that are installed), or none",
    )
    run_name: str | None = option(
        None, "name of the run in these services; unset: the last part of --output_dir"
    )
    project: str = option("fusedacl", "project of the run in these services (MLflow: experiment)")
    push_to_hub: bool = option(False, "upload the final model to the Hugging Face hub")
    hub_model_id: str | None = option(
        None,
        "repository on the hub, NAME or ORGANIZATION/NAME; unset: the last part of --output_dir",
    )
    hub_private_repo: bool | None = option(
        None, "whether a new repository is private; unset: as the account says"
    )
    device: str = device_option()
    ddp_timeout: float = option(
        600.0,
        "seconds that a process waits for the other processes before it ends with an error",
        above=0,
    )
    disable_tqdm: bool = disable_tqdm_option()

    @property
    def choice(self) -> dict[str, Any]:
        """The options that choose the step whose weights are the final ones; {}: the last step."""
        names: tuple[str, ...] = ("metric_for_best_model", "greater_is_better", "eval_steps")
        if self.early_stopping_patience is not None:
            names += ("early_stopping_patience", "early_stopping_threshold")
        elif not self.load_best_model_at_end:
            return {}
        return {name: getattr(self, name) for name in ("load_best_model_at_end", *names)}


def named_services(report_to: str) -> list[str] | None:
    """Services that `report_to` names, none if it is "none"; None if it is "all".

    Raises:
        ValueError: it names another one.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in report_to.split(",")))
    if names == ["all"]:
        return None
    if names in (["none"], [""]):
        return []
    for name in names:
        if name not in SERVICES:
            known = (*SERVICES, "all", "none")
            raise ValueError(
                f"report_to={report_to!r}: {name!r} is no service.{did_you_mean(name, known)}"
            )
    return names
