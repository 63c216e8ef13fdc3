"""The loop of a training run, and what the run leaves on the disk."""

import logging
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..config.fields import command_line, flatten, write_yaml
from ..config.sections import MULTI_LABEL, SINGLE_LABEL
from ..data.batching import epoch_batches
from ..inference.evaluation import evaluate_split
from ..inference.prediction import answer_splits
from ..model.saved import load_trained
from ..objectives.losses import check_finite
from ..runtime import collectives, processes
from ..runtime.collectives import Peers
from ..runtime.device import autocast
from ..runtime.files import flush, write_json
from ..runtime.machine import versions
from ..runtime.signals import Interrupted, SignalsNoted
from .builder import RunParts, new_backend, open_features
from .card import model_card
from .logs.metrics_log import METRICS_FILE, MetricsLog
from .logs.services import Service, open_services
from .micro_batches import StepLosses
from .profiling import StepProfiler, check_steps
from .records import GateHistory, StepRecords
from .stages import prepare
from .storage.checkpoint import (
    CONFIG_FILE,
    RESULTS_FILE,
    checkpoint_of,
    lasting_options,
    load_state,
    save_checkpoint,
    save_final,
    set_aside,
)
from .storage.hub import push
from .storage.output_dir import make_output_dir, remove_end
from .storage.resume import load_checkpoint
from .transfers import Stopwatch

logger = logging.getLogger("fusedacl")
# Seed offset per rank; larger than any seed a user would pick.
_RANK_SEEDS = 1_000_003


class Trainer:
    """Trains, evaluates and saves a run that was built; its output directory is taken here.

    Raises:
        ValueError: the checkpoint to resume from is damaged or of another run, DeepSpeed refuses
            the model, or the output directory is in use.
    """

    def __init__(self, parts: RunParts) -> None:
        self.parts = parts
        self.config = parts.config
        self.model = parts.model
        self.tokenizer = parts.tokenizer
        self.plan = parts.plan
        self.train_split = parts.train_split
        self.best = parts.best
        self.step = 0
        self.history = GateHistory()
        self.signals = SignalsNoted()
        self.seconds = 0.0
        self.resume_step: int | None = None
        self.resume_evaluated = False
        if self.config.run.resume_from_checkpoint is None:
            self._start_stage(0)
        else:
            self._resume()
        num_profiled = self.config.run.profile
        left = self.plan.ends[self.stage_index] - self.step
        check_steps(num_profiled, left, "stage" if len(self.plan.stages) > 1 else "run")
        # Last, because it may delete an old run.
        self.output_dir = collectives.from_first(self._take_output_dir)
        collectives.check_shared(self.output_dir)
        self.profiler = StepProfiler(
            num_profiled if processes.rank() == 0 else 0,
            parts.device,
            self.output_dir,
            trace=self.config.run.profile_trace,
        )
        # Dropout differs between processes.
        if processes.rank() > 0 and self.resume_step is None:
            torch.manual_seed(self.config.optimization.seed + _RANK_SEEDS * processes.rank())

    def _start_stage(self, index: int) -> None:
        self.stage_index = index
        self.stage = stage = self.plan.stages[index]
        groups = prepare(self.model, stage, self.config.optimization.freeze_layers)
        # Before the backend, which may shard the backbone.
        features = open_features(self.parts, stage)
        num_steps = self.plan.ends[index] - self.plan.start(index)
        self.backend = new_backend(self.parts, stage, groups, num_steps)
        self.losses = StepLosses(self.parts, stage, self.backend, features)
        self.stopping = self.parts.early_stopping(stage)

    def _take_output_dir(self) -> Path:
        self.parts.lock.take()
        # Checked again, because another run may have used it since.
        directory = make_output_dir(self.config)
        if self.resume_step is not None:
            set_aside(directory, self.resume_step)
        write_yaml(self.parts.given, directory / CONFIG_FILE)
        return directory

    def _resume(self) -> None:
        checkpoint, state = load_checkpoint(self.parts)
        index = state["stage_index"]
        # Checkpoints of earlier versions have no ends: no stage was ended early.
        ends = state.get("ends", self.plan.ends)
        for ended in range(index):
            self.plan = self.plan.ending(ended, ends[ended])
        self._start_stage(index)
        of_others = state.get("seeded_anew")
        if of_others is None:
            self.backend.load_state_dict(state["engine"])
        else:
            self.backend.load_parts(state["engine"])
        self.history.load_state_dict(state["history"])
        # Checkpoints of earlier versions have none, and their runs neither memory nor temperature.
        self.losses.load_state_dict(state.get("losses", {}))
        if of_others is not None:
            # Numbers that none of those processes has drawn.
            seeds = _RANK_SEEDS * (of_others + processes.rank())
            torch.manual_seed(self.config.optimization.seed + seeds)
        else:
            torch.set_rng_state(state["rng"])
            if self.parts.device.type == "cuda" and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"], self.parts.device)
        self.step = self.resume_step = state["step"]
        if self.stopping is not None:
            self.stopping.load_state_dict(state.get("early_stopping"))
            self._stop_stage_if_over()
        self.seconds = state["seconds"]
        self.resume_evaluated = state["evaluated"]
        logger.info(f"Resuming from {checkpoint} at step {self.step} of {self.plan.num_steps}.")

    def run(self, peers: Peers | None = None) -> dict[str, Any]:
        """Train, evaluate and save; see `train`. peers: tell when the launcher has ended."""
        options, data = self.config.run, self.parts.data
        logger.info(
            f"{data.name}: {len(self.train_split)} training texts, {len(data.label_names)} "
            f"classes; {self.plan.num_steps} steps ({self.plan.steps_per_epoch} an epoch) on "
            f"{self.parts.device.type} in {str(self.parts.dtype).removeprefix('torch.')}."
        )
        self.started = time.monotonic()
        bar = tqdm(
            total=self.plan.num_steps,
            initial=self.step,
            desc=f"train {self.config.objective.objective}",
            # None: no bar where the output is not a terminal.
            disable=None if self.parts.shows_progress else True,
        )
        services = collectives.together(self._open_services)
        log = collectives.together(lambda: self._open_log(services))
        with log, self.profiler, self.signals, bar:
            # A checkpoint is saved after the evaluation of the same step.
            evaluations = collectives.from_first(lambda: log.evaluations(self.step))
            evaluated = self.step if evaluations else -1
            for _ in self.steps(log, bar):
                if self._is_due(options.eval_steps):
                    evaluations = self._evaluate(log)
                    evaluated = self.step
                    self._consider_stopping(evaluations)
                    bar.total = self.plan.num_steps
                # A signal reaches the processes at different steps; they stop at the same one.
                number = collectives.largest(self._signalled(peers), self.parts.device)
                is_due = self._is_due(options.save_steps)
                if is_due and evaluated == self.step:
                    self._consider(evaluations)
                if is_due or number:
                    checkpoint = self._save_checkpoint(evaluated=evaluated == self.step)
                    if number:
                        raise Interrupted(number, checkpoint)
            if evaluated != self.step:
                evaluations = self._evaluate(log)
            self._consider(evaluations)
            self.seconds += time.monotonic() - self.started
            # Until then a run of several processes may have its weights in parts.
            self.backend.close()
            if self.best is not None and self.best.step not in (None, self.step):
                evaluations = self._take_best(self.best.step, log)
            results = self._results(evaluations)
            card = model_card(self.config, self.parts.base_model, results)
            files = collectives.from_first(
                lambda: save_final(self.output_dir, self.model, self.tokenizer, card)
            )
            # After the model is safe, for these may fail too.
            if self.parts.predicted:
                results["predictions"] = answer_splits(
                    self.output_dir,
                    self.model,
                    self.parts.predicted,
                    self.parts.data.metrics,
                    self.config.optimization.per_device_eval_batch_size,
                    pad_token_id=self.tokenizer.pad_token_id,
                    context=partial(autocast, self.parts.device, self.parts.dtype),
                    progress=self.parts.shows_progress,
                )
            collectives.from_first(lambda: write_json(self.output_dir / RESULTS_FILE, results))
            # Process 0 alone has one: an upload may take longer than the others would wait for it.
            if self.parts.repository is not None:
                push(self.output_dir, files, self.parts.repository)
        return results

    def _open_services(self) -> list[Service]:
        if processes.rank() > 0:
            return []
        given = flatten(self.parts.given)
        return open_services(self.config.run, given, self.output_dir, self.resume_step)

    def _open_log(self, services: list[Service]) -> MetricsLog:
        directory = self.output_dir if processes.rank() == 0 else None
        log = MetricsLog(directory, services, self.resume_step, self.resume_evaluated)
        # Here nothing is left that could refuse to resume.
        if directory is not None and self.resume_step is not None:
            remove_end(directory, self.parts.predicted)
        return log

    def steps(self, log: MetricsLog, bar: "tqdm[Any]") -> Iterator[None]:
        """Take the optimizer steps that are left, one per iteration."""

        def write(record: dict[str, Any]) -> None:
            log.write(record)
            shown = {"loss": f"{record['loss']:.3f}"}
            if record.get("angle_degrees") is not None:
                shown["angle"] = f"{record['angle_degrees']:.0f}°"
            bar.set_postfix(shown)

        self.records = StepRecords(self.config.objective, self.parts.device, self.history, write)
        for epoch, window in self._windows():
            with self.profiler.step():
                self._train_step(epoch, window)
            bar.update()
            yield
        self.records.pending.collect(wait=True)

    def _windows(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Epoch of the stage (1 is the first) and micro-batches of each step that is left."""
        options = self.config.optimization
        while self.step < self.plan.num_steps:
            if self.step == self.plan.ends[self.stage_index]:
                self.records.pending.collect(wait=True)
                self.backend.close()
                self._start_stage(self.stage_index + 1)
            plan = self.plan
            epoch, first = divmod(self.step - plan.start(self.stage_index), plan.steps_per_epoch)
            batches = epoch_batches(
                self.train_split.lengths,
                plan.batch_size,
                seed=options.seed,
                # Each stage has an order of its own.
                epoch=plan.epochs_before(self.stage_index) + epoch,
                group_by_length=self.config.data.group_by_length,
                balanced=self.parts.balanced,
            )
            size = plan.accumulation
            windows = [batches[start : start + size] for start in range(0, len(batches), size)]
            for window in windows[first:]:
                yield epoch + 1, window
                # Read anew: an evaluation may have ended the stage.
                if self.step == self.plan.ends[self.stage_index]:
                    break

    def _train_step(self, epoch: int, window: list[np.ndarray]) -> None:
        """Take one optimizer step; its values are checked and logged when they have arrived."""
        stopwatch = Stopwatch(self.parts.device)
        self.step += 1
        every = self.config.objective.gate_agreement_steps
        compare = every > 0 and self.step % every == 0 and self.stage.trains_backbone
        values = []
        for losses in self.losses.of(epoch, self.step - self.plan.start(self.stage_index), window):
            self.backend.backward(losses)
            values.append(losses.values())
        bad, num_samples = self.losses.num_not_finite, self.losses.num_samples
        try:
            report = self.backend.step(compare=compare)
        except FloatingPointError as error:
            # DeepSpeed's steps raise at once; bad representations would be the cause.
            counts = torch.stack(bad).sum(0).tolist()
            check_finite(counts, num_samples, self.step)
            raise FloatingPointError(f"Step {self.step}: {error}") from None
        learned = self.losses.learn(epoch, report)
        place = {"step": self.step, "epoch": self.plan.epoch_share(self.step), "split": "train"}
        gate_epoch = self.plan.epochs_before(self.stage_index) + epoch
        self.records.send(
            {**place, "gate_epoch": gate_epoch}, self.backend, report, bad, num_samples
        )
        is_due = self.step % self.config.run.logging_steps == 0 or self.step in self.plan.ends
        if is_due or compare:
            if len(self.plan.stages) > 1:
                place["stage"] = self.stage.name
            self.records.log(
                place,
                self.stage,
                epoch,
                list(self.backend.groups),
                torch.stack(values).sum(0),
                learned,
                report,
                sum(map(len, window)),
                stopwatch,
            )
        self.records.pending.collect()

    def _is_due(self, every: int | None) -> bool:
        return self.plan.is_due(self.step, self.stage_index, every)

    def _consider(self, evaluations: dict[str, Any]) -> None:
        """Compare an evaluation of the last stage with the best one so far."""
        if self.best is not None and self.stage is self.plan.stages[-1] and self._is_trained:
            first_split = self.parts.data.evaluation_splits[0]
            self.best.consider(self.step, evaluations[first_split])

    @property
    def _is_trained(self) -> bool:
        """False in an alternating stage's first epoch: some exits still have random weights."""
        stage_step = self.step - self.plan.start(self.stage_index)
        return not self.stage.alternates or stage_step > self.plan.steps_per_epoch

    def _consider_stopping(self, evaluations: dict[str, Any]) -> None:
        """End the stage here if `early_stopping_patience` is used up."""
        if self.stopping is not None and self._is_trained:
            self.stopping.consider(evaluations[self.parts.data.evaluation_splits[0]])
            self._stop_stage_if_over()

    def _stop_stage_if_over(self) -> None:
        stopping, index = self.stopping, self.stage_index
        if stopping is None or not stopping.is_over or self.step >= self.plan.ends[index]:
            return
        logger.info(
            f"Stage {self.stage.name!r} ends at step {self.step} of {self.plan.ends[index]}: "
            f"{stopping.num_without} evaluations in a row without a better {stopping.metric} than "
            f"{stopping.value:.4g}."
        )
        self.plan = self.plan.ending(index, self.step)

    def _take_best(self, step: int, log: MetricsLog) -> dict[str, Any]:
        """Load the weights of the best checkpoint into the model; returns its evaluations."""
        checkpoint = checkpoint_of(self.output_dir, step)
        trained = collectives.together(lambda: load_trained(str(checkpoint)))
        state = collectives.together(lambda: load_state(checkpoint))
        self.model.load_state_dict(trained.state_dict())
        self.losses.load_state_dict(state.get("losses", {}))
        logger.info("The final model is that of step %d, the best one.", step)
        return collectives.from_first(lambda: log.evaluations(step))

    def _signalled(self, peers: Peers | None) -> int:
        """The signal that came, else 0; SIGTERM too if the launcher has ended."""
        received = self.signals.received
        if received is None and peers is not None and peers.launcher_is_gone():
            self.signals.received = received = signal.SIGTERM
            logger.warning("The launcher has ended: saving after this step …")
        return received or 0

    def _evaluate(self, log: MetricsLog) -> dict[str, Any]:
        """Split -> layer -> metrics, for every evaluation split."""
        self.records.pending.collect(wait=True)
        results = {}
        for name in self.parts.data.evaluation_splits:
            try:
                by_layer = evaluate_split(
                    self.model,
                    self.parts.encoded[name],
                    self.parts.data.metrics,
                    self.config.optimization.per_device_eval_batch_size,
                    pad_token_id=self.tokenizer.pad_token_id,
                    context=self.backend.forward_context,
                    # Exits hold random weights before their stage.
                    positions=None if self.stage is self.plan.stages[-1] else self.stage.exits,
                    progress=self.parts.shows_progress,
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"Step {self.step}, {name}: {error}") from None
            results[name] = by_layer
            place = {"step": self.step, "epoch": self.plan.epoch_share(self.step), "split": name}
            for layer, metrics in by_layer.items():
                log.write({**place, "exit": layer, "metrics": metrics})
        return results

    def _save_checkpoint(self, *, evaluated: bool) -> Path:
        """evaluated: whether the evaluations of this step are in metrics.jsonl."""
        self.records.pending.collect(wait=True)
        if processes.rank() == 0:
            # A checkpoint without the records before it would leave a gap in them.
            flush(self.output_dir / METRICS_FILE)
        state = {
            "step": self.step,
            "world_size": processes.world_size(),
            "stage_index": self.stage_index,
            "engine": self.backend.state_dict(),
            "history": self.history.state_dict(),
            "losses": self.losses.state_dict(),
            "rng": torch.get_rng_state(),
            "seconds": self.seconds + time.monotonic() - self.started,
            "options": lasting_options(self.config),
            "best": None if self.best is None else self.best.state_dict(),
            "evaluated": evaluated,
            "ends": list(self.plan.ends),
            "early_stopping": None if self.stopping is None else self.stopping.state_dict(),
            "class_weights": self.parts.class_weights,
        }
        if self.parts.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.parts.device)
        return save_checkpoint(
            self.output_dir,
            self.step,
            self.model,
            self.backend.full_state_dict(),
            self.tokenizer,
            state,
            self.config.run.save_total_limit,
            None if self.best is None else self.best.step,
        )

    def _results(self, evaluations: dict[str, Any]) -> dict[str, Any]:
        samples = self.step * len(self.train_split) / self.plan.steps_per_epoch
        best = {} if self.best is None else {"best": self.best.result()}
        if self.stopping is not None:
            best["stopped_early"] = self.plan.ended_early(self.parts.plan)
        return {
            "data": self.parts.data.name,
            "problem_type": MULTI_LABEL if self.parts.data.several_labels else SINGLE_LABEL,
            "objective": self.config.objective.objective,
            "strategy": self.config.optimization.strategy,
            "seed": self.config.optimization.seed,
            "metrics": evaluations,
            **best,
            **self.losses.results(),
            "gate": self.history.summary(),
            "num_steps": self.plan.num_steps,
            "num_processes": processes.world_size(),
            "train_seconds": round(self.seconds, 2),
            "train_samples_per_second": round(samples / self.seconds, 2),
            "command": command_line(self.parts.given, "fusedacl train"),
            "options": lasting_options(self.config),
            "versions": versions(),
        }
