"""The checkpoint from which a run continues."""

import logging
from pathlib import Path
from typing import Any

from ...config.training import TrainingConfig
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

logger = logging.getLogger("fusedacl")
# Options that another number of processes must change to keep the texts of a step.
_BATCH_OPTIONS = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Those that may change on resuming: the cache too, which may have no room or belong to another run.
_FREE = (*_BATCH_OPTIONS, "feature_cache")


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
        state = load_state(checkpoint)
        other_processes = state.get("world_size", 1) != processes.world_size()
        now = lasting_options(config)
        # config.yaml may stem from a run with other processes that saved no checkpoint.
        changed = changed_options(output_dir, config, _FREE)
        if not other_processes:
            then = {name: state["options"][name] for name in _BATCH_OPTIONS}
            changed += differences(then, now)
        if changed:
            raise ValueError(
                f"resume_from_checkpoint: the options differ from those in "
                f"{str(output_dir / CONFIG_FILE)!r} ({'; '.join(changed)}). "
                "Resume with the same options, or start a new run."
            )
        changed = differences(state["options"], now, _FREE)
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
        if other_processes:
            return _of_other_processes(checkpoint, state, config)
        return state if processes.rank() == 0 else load_state(checkpoint, processes.rank())

    state = collectives.together(load)
    if best is not None:
        best.load_state_dict(state["best"])
        if not best.belongs(state["best"]):
            logger.warning(
                f"load_best_model_at_end: steps until {state['step']} are not compared, because "
                "the run was started without it, or with another metric_for_best_model."
            )
        if best.step is not None:
            kept = checkpoint_of(output_dir, best.step)
            problem = collectives.from_first(lambda: fault(kept))
            if problem is not None:
                raise ValueError(
                    f"load_best_model_at_end: the best checkpoint so far is lost ({problem}). "
                    "Resume without load_best_model_at_end, or from a checkpoint before it."
                )
    return checkpoint, state


def _of_other_processes(
    checkpoint: Path, state: dict[str, Any], config: TrainingConfig
) -> dict[str, Any]:
    """The state from which this process continues a run of more, or fewer, processes.

    Args:
        state: that of the run's first process. The others differ in what `engine` and `losses`
            hold, and in their random numbers.

    Raises:
        ValueError: the parts cannot be joined, or a step would have another number of texts.
    """
    before, now = state["world_size"], processes.world_size()
    saved = f"{str(checkpoint)!r} was saved by {before} process(es), and this run has {now}"
    remedy = f"Resume with {before}, or start a new run from the weights (model_name_or_path)."
    if "places" not in state["engine"]:
        raise ValueError(
            f"{saved}: it does not say which parts of the optimizer each process held, as runs "
            f"under DeepSpeed do now. {remedy}"
        )
    if state.get("losses", {}).get("memory") is not None:
        raise ValueError(
            f"{saved}: each process has a memory of its own (memory_size), of other texts. {remedy}"
        )

    def texts(options: dict[str, Any], num_processes: int) -> int:
        return num_processes * options[_BATCH_OPTIONS[0]] * options[_BATCH_OPTIONS[1]]

    was, is_ = texts(state["options"], before), texts(lasting_options(config), now)
    if was != is_:
        remedy = f"{was} texts do not divide among {now} processes: start another number"
        if was % now == 0:
            remedy = f"the product of {' and '.join(_BATCH_OPTIONS)} must be {was // now}"
        raise ValueError(f"{saved}: a step had {was} texts and would have {is_}; {remedy}.")
    logger.info(
        f"{saved}: the parts of the optimizer are joined and divided anew. Dropout draws other "
        "numbers, and a contrastive batch without negatives=global has other texts."
    )
    parts = [
        state["engine"],
        *(load_state(checkpoint, rank)["engine"] for rank in range(1, before)),
    ]
    return {**state, "engine": parts, "seeded_anew": before}
