"""The checkpoint from which a run continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config.training import TrainingConfig
from ...model.multi_exit import MultiExitForSequenceClassification
from ...model.saved import load_trained, record_of
from ...runtime import collectives, processes
from ...runtime.lock import RunLock
from ...runtime.manifest import fault
from .best_model import BestModel
from .checkpoint import (
    check_own,
    check_same_run,
    checkpoint_of,
    find_checkpoint,
    load_state,
    tidy,
)


def load_checkpoint(
    name: str,
    config: TrainingConfig,
    model: MultiExitForSequenceClassification,
    best: BestModel | None,
    lock: RunLock,
) -> tuple[Path, dict[str, Any]]:
    """Load a checkpoint's weights into the model; return its path and state. Collective.

    Args:
        name: as `find_checkpoint` takes it.
        best: gets what the checkpoint knows of the best step.
        lock: of the output directory, taken here.

    Raises:
        ValueError: there is no such checkpoint, it is damaged or of another run, or the best
            checkpoint so far is lost; or the run was started with other texts, labels, classes
            or columns.
    """
    output_dir = Path(str(config.run.output_dir))

    def find() -> Path:
        if output_dir.is_dir():
            lock.take()
            tidy(output_dir)
        return find_checkpoint(output_dir, name)

    # One process looks for all: a checkpoint is gigabytes, and they must agree on it.
    checkpoint = collectives.from_first(find)

    def load() -> dict[str, Any]:
        check_same_run(output_dir, config)
        state = load_state(checkpoint, processes.rank(), processes.world_size())
        check_own(checkpoint, state, config)
        trained = load_trained(str(checkpoint))
        differences = record_of(trained).differences(record_of(model))
        if differences:
            raise ValueError(
                f"{str(checkpoint)!r} was trained on other data: now {'; '.join(differences)}. "
                "Resume with the data that the run was started with, or start a new run in another "
                "output_dir."
            )
        try:
            model.load_state_dict(trained.state_dict())
        except RuntimeError as error:
            raise ValueError(f"{str(checkpoint)!r} holds another model: {error}") from None
        return state

    state = collectives.together(load)
    if best is not None:
        best.load_state_dict(state["best"])
        collectives.from_first(lambda: _check_best(output_dir, best.step))
    return checkpoint, state


def _check_best(output_dir: Path, step: int | None) -> None:
    """Refuse to continue if the best checkpoint so far, which the end may need, is lost."""
    problem = None if step is None else fault(checkpoint_of(output_dir, step))
    if problem is not None:
        raise ValueError(
            f"load_best_model_at_end: the best checkpoint so far is lost ({problem}). Resume "
            "without load_best_model_at_end, or from a checkpoint before it."
        )
