"""The training run: data and model from the configuration, the loop, and what the run leaves."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..kernels.dispatch import Workload, choose
from .batching import collate, encode, epoch_batches
from .cached_batches import Chunk, cached_losses
from .checkpoint import (
    CONFIG_FILE,
    check_output_dir,
    check_same_run,
    find_checkpoint,
    load_state,
    make_output_dir,
    save_checkpoint,
    save_model,
    write_atomically,
    write_json,
)
from .config import TrainingConfig
from .data import load_splits
from .doctor import versions
from .evaluation import evaluate_split
from .feature_cache import FeatureCache, check_directory
from .gate import GateDecision
from .loading import DEFAULT_MAX_LENGTH, length_limit, load_tokenizer, load_trained
from .local import LocalEngine, StepReport
from .model_card import model_card
from .modeling import MultiExitForSequenceClassification, parse_layers, take_last_exit
from .objectives import ExitLosses, check_finite, exit_losses
from .options import command_line, flatten, write_yaml
from .precision import choose_device, choose_dtype
from .quickstart import minilm_path
from .strategies import (
    check_exits,
    needed_exits,
    plan_stages,
    prepare,
    stage_outputs,
    stage_states,
)
from .tracking import GateHistory, MetricsLog, require_reporting

logger = logging.getLogger("fusedacl")


class Interrupted(Exception):
    """The run was stopped by a signal after saving a checkpoint; `exit_code` tells which signal."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(
            f"Stopped by {signal.Signals(number).name}. Saved {checkpoint}. Continue by running "
            "the same command with --resume_from_checkpoint latest."
        )
        self.exit_code = 128 + number


def train(config: TrainingConfig) -> dict[str, Any]:
    """Fine-tune an encoder as `config` says; returns what is written to `results.json`.

    Raises:
        ValueError: a mistake in the configuration or the data, before any training.
        FloatingPointError: NaN or infinite representations or gradients.
        OSError: the disk is full; earlier checkpoints are intact.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    return Trainer(config).run()


class Trainer:
    """One run. Everything that can be refused is refused by the constructor."""

    def __init__(self, config: TrainingConfig) -> None:
        # What the user wrote is what is kept; what it implies is implied anew.
        self.given = config
        self.config = config = config.resolved()
        check_output_dir(config)
        require_reporting(config.run.report_to)
        self.device = choose_device(config.run.device)
        choose(
            config.objective.impl,
            Workload(
                self.device,
                choose_dtype(
                    self.device, fp16=config.optimization.fp16, bf16=config.optimization.bf16
                ),
                temperature=config.objective.temperature,
                num_rows=config.optimization.per_device_train_batch_size,
            ),
        )
        self.data = load_splits(
            task_name=config.data.task_name,
            data_dir=config.data.data_dir,
            dataset_name=config.data.dataset_name,
            dataset_config_name=config.data.dataset_config_name,
            train_file=config.data.train_file,
            validation_file=config.data.validation_file,
            max_train_samples=config.data.max_train_samples,
            max_eval_samples=config.data.max_eval_samples,
        )
        for note in self.data.notes:
            logger.info(note)
        if config.without_effect:
            logger.info(
                "no effect with objective=%s, gate=%s: %s.",
                config.objective.objective,
                config.objective.gate,
                ", ".join(config.without_effect),
            )
        torch.manual_seed(config.optimization.seed)
        self.base_model = name_or_path = (
            config.optimization.stage1_model
            or config.model.model_name_or_path
            or str(minilm_path())
        )
        self.model = self._new_model(name_or_path)
        is_stage1 = config.optimization.stage1_model is not None
        self.tokenizer = load_tokenizer(
            name_or_path, "stage1_model" if is_stage1 else "model_name_or_path"
        )
        limit = length_limit(self.model, self.tokenizer)
        max_length = config.data.max_seq_length or min(DEFAULT_MAX_LENGTH, limit)
        self.model.config.max_seq_length = max_length
        self.encoded = {
            name: encode(split, self.tokenizer, max_length, model_limit=limit)
            for name, split in self.data.splits.items()
        }
        for name, encoded in self.encoded.items():
            if encoded.num_truncated:
                logger.info(
                    "%s: %d of %d texts are longer than max_seq_length=%d and lose their ends.",
                    name,
                    encoded.num_truncated,
                    len(encoded),
                    max_length,
                )
        self.train_split = self.encoded["train"]
        self._plan_steps()
        if config.optimization.feature_cache is not None:
            check_directory(Path(config.optimization.feature_cache), self.train_split)
        self.step = 0
        self._start_stage(0)
        self.history = GateHistory()
        self.signal: int | None = None
        self.seconds = 0.0
        self.resume_step: int | None = None
        if config.run.resume_from_checkpoint is not None:
            self._resume(config.run.resume_from_checkpoint)
        # Last, because it may delete an old run.
        self.output_dir = make_output_dir(config)
        write_yaml(self.given, self.output_dir / CONFIG_FILE)

    def _new_model(self, name_or_path: str) -> MultiExitForSequenceClassification:
        options = self.config.model
        strategy, stage1 = self.config.optimization.strategy, self.config.optimization.stage1_model
        trained = None if stage1 is None else load_trained(stage1, "stage1_model")
        model = MultiExitForSequenceClassification.from_encoder(
            name_or_path,
            label_names=self.data.label_names,
            dropout=options.dropout,
            num_hidden_layers=options.num_hidden_layers,
            exit_layers=None if strategy == "single" else parse_layers(options.exit_layers),
            exit_head=options.exit_head,
            exit_width=options.exit_width,
            exit_attention_heads=options.exit_attention_heads,
        )
        if stage1 is not None and trained is not None:
            take_last_exit(model, trained, stage1)
        check_exits(strategy, model.exit_layers, model.config.backbone_config.num_hidden_layers)
        nn.Module.to(model, self.device)
        return model

    def _plan_steps(self) -> None:
        options = self.config.optimization
        num_batches = math.ceil(len(self.train_split) / options.per_device_train_batch_size)
        self.steps_per_epoch = math.ceil(num_batches / options.gradient_accumulation_steps)
        self.stages = plan_stages(
            self.config, len(self.model.exit_layers), options.stage1_model is not None
        )
        # The step at which each stage ends.
        self.stage_ends: list[int] = []
        for stage in self.stages:
            steps = options.max_steps
            if steps < 0:
                steps = max(1, round(stage.num_epochs * self.steps_per_epoch))
            if stage.alternates and steps <= self.steps_per_epoch:
                raise ValueError(
                    f"strategy=alternating trains the last exit alone in the first epoch: {steps} "
                    f"steps of {self.steps_per_epoch} an epoch never reach the others. Use "
                    "num_train_epochs of 2 or more."
                )
            self.stage_ends.append(sum(self.stage_ends[-1:]) + steps)
        self.num_steps = self.stage_ends[-1]

    def _start_stage(self, index: int) -> None:
        self.stage_index = index
        self.stage = self.stages[index]
        self.stage_start = self.stage_ends[index - 1] if index else 0
        self.engine = LocalEngine(
            self.model,
            self.config,
            self.stage_ends[index] - self.stage_start,
            self.device,
            groups=prepare(self.model, self.stage),
            # On a frozen backbone the exits have nothing in common.
            independent=not self.stage.trains_backbone,
            learning_rate=self.stage.learning_rate,
        )
        self.features: FeatureCache | None = None

    def _open_features(self) -> None:
        """The feature cache, in a stage that can use one and where one is asked for."""
        directory = self.config.optimization.feature_cache
        if directory is None or self.stage.trains_backbone or self.features is not None:
            return
        self.features = FeatureCache(
            Path(directory),
            self.model,
            self.train_split,
            needed_exits(self.model, self.stage, self.stage.exits),
            batch_size=self.config.optimization.per_device_eval_batch_size,
            pad_token_id=self.tokenizer.pad_token_id,
            dtype=self.engine.dtype,
            progress=not self.config.run.disable_tqdm,
        )

    def _resume(self, name: str) -> None:
        output_dir = Path(str(self.config.run.output_dir))
        checkpoint = find_checkpoint(output_dir, name)
        check_same_run(output_dir, self.config)
        state = load_state(checkpoint)
        self.model.load_state_dict(load_trained(str(checkpoint)).state_dict())
        self._start_stage(state["stage_index"])
        self.engine.load_state_dict(state["engine"])
        self.history.load_state_dict(state["history"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step = self.resume_step = state["step"]
        self.seconds = state["seconds"]
        logger.info("Resuming from %s at step %d of %d.", checkpoint, self.step, self.num_steps)

    def run(self) -> dict[str, Any]:
        """Train, evaluate and save; see `train`."""
        options = self.config.run
        logger.info(
            "%s: %d training texts, %d classes; %d steps (%d an epoch) on %s in %s.",
            self.data.name,
            len(self.train_split),
            len(self.data.label_names),
            self.num_steps,
            self.steps_per_epoch,
            self.device.type,
            str(self.engine.dtype).removeprefix("torch."),
        )
        self.started = time.monotonic()
        with (
            MetricsLog(self.output_dir, options.report_to, self.resume_step) as log,
            _SignalsNoted(self),
            tqdm(
                total=self.num_steps,
                initial=self.step,
                desc=f"train {self.config.objective.objective}",
                # None: no bar where the output is not a terminal.
                disable=True if options.disable_tqdm else None,
            ) as bar,
        ):
            # A checkpoint is saved after the evaluation of the same step.
            evaluations = log.evaluations(self.step)
            evaluated = self.step if evaluations else -1
            for epoch, windows in self._epochs():
                for window in windows:
                    self._train_step(epoch, window, log, bar)
                    if self._due(options.eval_steps):
                        evaluations = self._evaluate(log)
                        evaluated = self.step
                    if self._due(options.save_steps) or self.signal is not None:
                        checkpoint = self._save_checkpoint()
                        if self.signal is not None:
                            raise Interrupted(self.signal, checkpoint)
            if evaluated != self.step:
                evaluations = self._evaluate(log)
            self.seconds += time.monotonic() - self.started
            results = self._results(evaluations)
            self._save_final(results)
        return results

    def _due(self, every: int | None) -> bool:
        """Whether an evaluation or a checkpoint is due now; None: each epoch, 0: never."""
        if every == 0:
            return False
        # What a stage leaves is looked at and saved before the next one begins.
        between_stages = self.step in self.stage_ends[:-1]
        return (
            between_stages or (self.step - self.stage_start) % (every or self.steps_per_epoch) == 0
        )

    def _epochs(self) -> Iterator[tuple[int, Iterator[list[np.ndarray]]]]:
        """Epoch of the stage (1 = first) and its steps still to do: lists of micro-batches."""
        options = self.config.optimization
        while self.step < self.num_steps:
            if self.step == self.stage_ends[self.stage_index]:
                self._start_stage(self.stage_index + 1)
            self._open_features()
            epoch, first = divmod(self.step - self.stage_start, self.steps_per_epoch)
            batches = epoch_batches(
                self.train_split.lengths,
                options.per_device_train_batch_size,
                seed=options.seed,
                # Each stage has an order of its own.
                epoch=self.epochs_before + epoch,
                group_by_length=self.config.data.group_by_length,
            )
            size = options.gradient_accumulation_steps
            windows = [batches[start : start + size] for start in range(0, len(batches), size)]
            last = min(len(windows), first + self.stage_ends[self.stage_index] - self.step)
            yield epoch + 1, iter(windows[first:last])

    @property
    def epochs_before(self) -> int:
        """Epochs, also begun ones, of the stages before this one."""
        return math.ceil(self.stage_start / self.steps_per_epoch)

    def _train_step(
        self, epoch: int, window: list[np.ndarray], log: MetricsLog, bar: tqdm[Any]
    ) -> None:
        started = time.monotonic()
        num_samples = sum(len(indices) for indices in window)
        self.step += 1
        losses = []
        for share, batch_losses in self._window_losses(epoch, window):
            self.engine.backward(batch_losses, share)
            losses.append((share, batch_losses))
        try:
            report = self.engine.step()
        except FloatingPointError as error:
            raise FloatingPointError(f"Step {self.step}: {error}") from None
        record = self._record(epoch, losses, report)
        if report.decision is not None and not report.skipped:
            self._remember(epoch, report.decision)
        bar.update()
        if self.step % self.config.run.logging_steps == 0 or self.step in self.stage_ends:
            speed = num_samples / (time.monotonic() - started)
            log.write({**record, "samples_per_second": round(speed, 2)})
            shown = {"loss": f"{record['loss']:.3f}"}
            if record.get("angle_degrees") is not None:
                shown["angle"] = f"{record['angle_degrees']:.0f}°"
            bar.set_postfix(shown)

    def _remember(self, epoch: int, decision: GateDecision) -> None:
        """Add a step's angles and decisions to the history, group by group."""
        seen = zip(
            self.engine.groups,
            decision.active.tolist(),
            decision.angle.tolist(),
            decision.kept.tolist(),
            strict=True,
        )
        for group, active, angle, kept in seen:
            if active:
                self.history.add(self.epochs_before + epoch, group, angle, dropped=not kept)

    def _window_losses(
        self, epoch: int, window: list[np.ndarray]
    ) -> Iterator[tuple[float, ExitLosses]]:
        """Share of the step's samples and losses of each of its micro-batches."""
        positions = self.stage.exits_in_epoch(epoch)
        num_samples = sum(len(indices) for indices in window)
        shares = [len(indices) / num_samples for indices in window]

        def label_embeddings() -> Tensor:
            return self.model.label_embeddings_of(positions)

        together = self.config.chunks_together
        for start in range(0, len(window), together):
            chunks = window[start : start + together]
            forwards = [partial(self._forward, positions, indices) for indices in chunks]
            of_chunks = shares[start : start + together]
            if len(chunks) == 1:
                chunk = forwards[0]()
                with self.engine.forward_context():
                    yield (
                        of_chunks[0],
                        exit_losses(
                            self.config.objective,
                            chunk.output,
                            label_embeddings(),
                            chunk.labels,
                            chunk.teacher,
                        ),
                    )
                continue
            losses = cached_losses(
                forwards,
                label_embeddings,
                self.config.objective,
                shares=of_chunks,
                loss_scale=self.engine.loss_scale,
                device=self.device,
            )
            yield from zip(of_chunks, losses, strict=True)

    def _forward(self, positions: tuple[int, ...], indices: np.ndarray) -> Chunk:
        """Outputs of the trained exits, and of their teacher, for some training texts."""
        if self.features is not None:
            states, mask = self.features.batch(indices, self.device)
            assert self.train_split.labels is not None
            labels = self.train_split.labels[indices].to(self.device)
        else:
            batch = collate(self.train_split, indices, self.tokenizer.pad_token_id)
            batch = {name: value.to(self.device) for name, value in batch.items()}
            labels, mask = batch.pop("labels"), batch["attention_mask"]
            with self.engine.forward_context():
                states = stage_states(self.model, self.stage, positions, batch)
        with self.engine.forward_context():
            output, teacher = stage_outputs(self.model, self.stage, positions, states, mask)
        check_finite(output, self.step)
        return Chunk(output, labels, teacher)

    def _record(
        self, epoch: int, losses: list[tuple[float, ExitLosses]], report: StepReport
    ) -> dict[str, Any]:
        """The line of metrics.jsonl for one optimizer step; losses are sums over the exits."""
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "split": "train",
        }
        if len(self.stages) > 1:
            record["stage"] = self.stage.name
        main = torch.stack([share * batch.main.detach() for share, batch in losses]).sum(0)  # [E]
        cross_entropy = sum(
            share * batch.cross_entropy.sum().item()
            for share, batch in losses
            if batch.cross_entropy is not None
        )
        loss = main
        if self.config.objective.objective != "ce":
            auxiliary = torch.stack(
                [
                    share * a.detach()
                    for share, batch in losses
                    if (a := batch.auxiliary) is not None
                ]
            ).sum(0)
            weight = torch.full_like(main, self.config.objective.aux_weight)
            if report.decision is not None:
                record |= self._angles(report.decision)
                if not report.skipped:
                    weight *= self._kept(epoch, report.decision)
            loss = (1 - weight) * main + weight * auxiliary
            record |= {"loss_aux": auxiliary.sum().item(), "aux_weight": weight.mean().item()}
        record |= {
            "loss": loss.sum().item(),
            "loss_ce": cross_entropy,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "loss_scale": report.loss_scale,
            "skipped": report.skipped,
        }
        # JSON has no NaN: an overflow leaves no angle and no norm.
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }

    def _angles(self, decision: GateDecision) -> dict[str, float]:
        """Angle of the only group, or of each group that a gradient reached."""
        names = self.engine.groups
        if list(names) == ["model"]:
            return {"angle_degrees": decision.angle[0].item()}
        return {
            f"angle_degrees {name}": angle
            for name, active, angle in zip(
                names, decision.active.tolist(), decision.angle.tolist(), strict=True
            )
            if active
        }

    def _kept(self, epoch: int, decision: GateDecision) -> Tensor:
        """1 for an exit whose contrastive term was kept, 0 for one without it, [E]."""
        if len(self.engine.groups) == 1:
            return decision.kept.float()
        groups = [self.stage.exits.index(p) for p in self.stage.exits_in_epoch(epoch)]
        return decision.kept[groups].float()

    def _evaluate(self, log: MetricsLog) -> dict[str, Any]:
        """Split -> layer -> metrics, for every evaluation split."""
        results = {}
        for name in self.data.evaluation_splits:
            by_layer = evaluate_split(
                self.model,
                self.encoded[name],
                self.data.metrics,
                self.config.optimization.per_device_eval_batch_size,
                pad_token_id=self.tokenizer.pad_token_id,
                dtype=self.engine.dtype,
                # Before their stage exits hold random weights.
                positions=None if self.stage is self.stages[-1] else self.stage.exits,
                progress=not self.config.run.disable_tqdm,
            )
            results[name] = by_layer
            for layer, metrics in by_layer.items():
                place = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4)}
                log.write({**place, "split": name, "exit": layer, "metrics": metrics})
        return results

    def _save_checkpoint(self) -> Path:
        state = {
            "step": self.step,
            "stage_index": self.stage_index,
            "engine": self.engine.state_dict(),
            "history": self.history.state_dict(),
            "rng": torch.get_rng_state(),
            "seconds": self.seconds + time.monotonic() - self.started,
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return save_checkpoint(
            self.output_dir,
            self.step,
            self.model,
            self.tokenizer,
            state,
            self.config.run.save_total_limit,
        )

    def _save_final(self, results: dict[str, Any]) -> None:
        """The final model and its card at the top of the output directory, and the results."""
        directory = self.output_dir / "model"

        def write(partial: Path) -> None:
            save_model(partial, self.model, self.tokenizer)
            card = model_card(self.config, self.base_model, results)
            (partial / "README.md").write_text(card, encoding="utf-8")

        write_atomically(directory, write)
        for file in directory.iterdir():
            file.replace(self.output_dir / file.name)
        directory.rmdir()
        write_json(self.output_dir / "results.json", results)

    def _results(self, evaluations: dict[str, Any]) -> dict[str, Any]:
        samples = self.step * len(self.train_split) / self.steps_per_epoch
        free = vars(self.config.run)
        options = {name: v for name, v in flatten(self.config).items() if name not in free}
        return {
            "data": self.data.name,
            "objective": self.config.objective.objective,
            "strategy": self.config.optimization.strategy,
            "seed": self.config.optimization.seed,
            "metrics": evaluations,
            "gate": self.history.summary(),
            "num_steps": self.num_steps,
            "train_seconds": round(self.seconds, 2),
            "train_samples_per_second": round(samples / self.seconds, 2),
            "command": command_line(self.given, "fusedacl train"),
            "options": options,
            "versions": versions(),
        }


class _SignalsNoted:
    """Within the block SIGINT and SIGTERM are noted for the end of the step; a second one acts."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: the caller's signals are the caller's
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.trainer.signal is not None:
            raise KeyboardInterrupt
        self.trainer.signal = number
        logger.warning("%s: saving after this step …", signal.Signals(number).name)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
