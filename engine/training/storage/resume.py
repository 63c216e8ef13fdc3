"""The checkpoint from which a run continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config.training import TrainingConfig
from ...model.multi_exit import MultiExitForSequenceClassification
from ...model.saved import load_trained
from ...runtime import collectives, processes
from ...runtime.lock import RunLock
from ...runtime.manifest import fault
from .best_model import BestModel
from .checkpoint import (
    check_same_run,
    checkpoint_of,
    differences,
    find_checkpoint,
    lasting_options,
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
            checkpoint so far is lost.
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
        changed = differences(state["options"], lasting_options(config))
        if changed:
            raise ValueError(
                f"{str(checkpoint)!r} was saved by a run with other options ({'; '.join(changed)})."
                " Take it out of this run's directory; 'latest' then finds this run's own."
            )
        try:
            model.load_state_dict(load_trained(str(checkpoint)).state_dict())
        except RuntimeError as error:
            raise ValueError(f"{str(checkpoint)!r} holds another model: {error}") from None
        return state

    state = collectives.together(load)
    if best is not None:
        best.load_state_dict(state["best"])
        if best.step is not None:
            kept = checkpoint_of(output_dir, best.step)
            problem = collectives.from_first(lambda: fault(kept))
            if problem is not None:
                raise ValueError(
                    f"load_best_model_at_end: the best checkpoint so far is lost ({problem}). "
                    "Resume without load_best_model_at_end, or from a checkpoint before it."
                )
    return checkpoint, state
