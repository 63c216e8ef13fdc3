"""The checkpoint from which a run continues."""

from pathlib import Path
from typing import Any

from ...model.saved import load_trained, record_of
from ...runtime import collectives, processes
from ...runtime.manifest import fault
from ..builder import RunParts
from .checkpoint import (
    CONFIG_FILE,
    changed_options,
    checkpoint_of,
    differences,
    find_checkpoint,
    lasting_options,
    load_state,
    tidy,
)


def load_checkpoint(parts: RunParts) -> tuple[Path, dict[str, Any]]:
    """Load the weights of the checkpoint to resume from; return its path and state. Collective.

    The lock of the output directory is taken, and `best` gets what the checkpoint knows of it.

    Raises:
        ValueError: there is no such checkpoint, it is damaged or of another run, or the best
            checkpoint so far is lost; or the run was started with other texts, labels, classes
            or columns.
    """
    config, best = parts.config, parts.best
    output_dir = Path(str(config.run.output_dir))

    def find() -> Path:
        if output_dir.is_dir():
            parts.lock.take()
            tidy(output_dir)
        return find_checkpoint(output_dir, str(config.run.resume_from_checkpoint))

    # One process looks for all: a checkpoint is gigabytes, and they must agree on it.
    checkpoint = collectives.from_first(find)

    def load() -> dict[str, Any]:
        changed = changed_options(output_dir, config)
        if changed:
            raise ValueError(
                f"resume_from_checkpoint: the options differ from those in "
                f"{str(output_dir / CONFIG_FILE)!r} ({'; '.join(changed)}). "
                "Resume with the same options, or start a new run."
            )
        state = load_state(checkpoint, processes.rank(), processes.world_size())
        changed = differences(state["options"], lasting_options(config))
        if changed:
            raise ValueError(
                f"{str(checkpoint)!r} was saved by a run with other options ({'; '.join(changed)})."
                " Take it out of this run's directory; 'latest' then finds this run's own."
            )
        trained = load_trained(str(checkpoint))
        changed = record_of(trained).differences(record_of(parts.model))
        if changed:
            raise ValueError(
                f"{str(checkpoint)!r} was trained on other data: now {'; '.join(changed)}. Resume "
                "with the data that the run was started with, or start a new run in another "
                "output_dir."
            )
        weights = state.get("class_weights", parts.class_weights)
        if weights != parts.class_weights:
            raise ValueError(
                f"class_weights: {parts.class_weights} now, {weights} when {str(checkpoint)!r} was "
                "saved. Resume with the same file, or start a new run."
            )
        try:
            parts.model.load_state_dict(trained.state_dict())
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
