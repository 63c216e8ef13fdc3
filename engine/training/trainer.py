"""The training run: data and model from the configuration, the loop, and what the run leaves."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...kernels.contrastive.dispatch import Workload, choose
from ..backends.interface import Engine, StepReport
from ..backends.local import LocalEngine
from ..config.fields import command_line, write_yaml
from ..config.training import TrainingConfig
from ..data.batching import encode, epoch_batches
from ..data.dataset import load_splits
from ..data.quickstart import minilm_path
from ..inference.evaluation import evaluate_split
from ..model.multi_exit import MultiExitForSequenceClassification, parse_layers
from ..model.saved import DEFAULT_MAX_LENGTH, length_limit, load_tokenizer, load_trained
from ..objectives.gate import GateDecision
from ..runtime import collectives, processes
from ..runtime.device import choose_device, choose_dtype
from ..runtime.failures import Peers
from ..runtime.files import flush, write_json
from ..runtime.lock import RunLock
from ..runtime.machine import versions
from ..runtime.manifest import fault
from ..runtime.signals import Interrupted, SignalsNoted
from .builder import take_last_exit, uses_deepspeed
from .card import model_card
from .feature_cache import FeatureCache, check_directory
from .metrics_log import Log, MetricsLog, NoLog, require_reporting
from .micro_batches import StepLosses
from .profiling import WARM_UP, StepProfiler
from .records import GateHistory, agreements, comparison
from .stages import check_exits, needed_exits, plan_stages, prepare
from .storage.best_model import BestModel, scored_layers
from .storage.checkpoint import (
    CONFIG_FILE,
    check_own,
    check_same_run,
    checkpoint_of,
    find_checkpoint,
    lasting_options,
    load_state,
    save_checkpoint,
    save_model,
    set_aside,
    tidy,
    write_atomically,
)
from .storage.output_dir import check_output_dir, make_output_dir

logger = logging.getLogger("fusedacl")
# Between the seeds of processes: further than people's seeds are.
_RANK_SEEDS = 1_000_003


class Trainer:
    """One run. What can be refused is refused by the constructor and by `prepare`."""

    def __init__(self, config: TrainingConfig) -> None:
        # What the user wrote is what is kept; what it implies is implied anew.
        self.given = config
        self.config = config = config.resolved()
        self.lock = RunLock(Path(str(config.run.output_dir)))
        # Before a message that recommends to delete what is there.
        self.lock.check_free()
        check_output_dir(config)
        require_reporting(config.run.report_to)
        self.uses_deepspeed = uses_deepspeed(config)
        if self.uses_deepspeed:
            self.device = processes.join(config.run.device, config.run.ddp_timeout)
        else:
            self.device = choose_device(config.run.device)
        self.dtype = choose_dtype(
            self.device, fp16=config.optimization.fp16, bf16=config.optimization.bf16
        )
        choose(
            config.objective.impl,
            Workload(
                self.device,
                self.dtype,
                temperature=config.objective.temperature,
                num_rows=config.optimization.per_device_train_batch_size,
            ),
        )
        self.deepspeed_config: dict[str, Any] = {}
        if config.optimization.deepspeed_config is not None:
            from ..backends.deepspeed.settings import read_deepspeed_config

            self.deepspeed_config = read_deepspeed_config(config.optimization.deepspeed_config)
        self.data = load_splits(config.data)
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
        self.best = self._new_best()
        if config.optimization.feature_cache is not None:
            check_directory(Path(config.optimization.feature_cache), self.train_split)
        self.step = 0
        self.history = GateHistory()
        self.signals = SignalsNoted()
        self.peers: Peers | None = None
        self.seconds = 0.0
        self.resume_step: int | None = None
        self.resume_evaluated = False
        self.is_prepared = False

    def prepare(self) -> None:
        """Make the engine, find the checkpoint to resume from, and make the output directory.

        Raises:
            ValueError: the checkpoint is damaged or another run's, or DeepSpeed refuses the model.
        """
        if self.is_prepared:
            return
        try:
            self._prepare()
        except BaseException:
            self.lock.release()
            raise
        self.is_prepared = True

    def _prepare(self) -> None:
        if self.config.run.resume_from_checkpoint is None:
            self._start_stage(0)
        else:
            self._resume(self.config.run.resume_from_checkpoint)
        profiled = self._check_profile()
        # Last, because it may delete an old run.
        self.output_dir = collectives.from_first(self._take_output_dir)
        if processes.rank() == 0:
            write_yaml(self.given, self.output_dir / CONFIG_FILE)
        elif not (self.output_dir / CONFIG_FILE).parent.is_dir():
            raise ValueError(
                f"output_dir={str(self.output_dir)!r} is not there: it must lie on a file system "
                "that all processes share."
            )
        self.profiler = StepProfiler(
            profiled if processes.rank() == 0 else 0,
            self.device,
            self.output_dir,
            trace=self.config.run.profile_trace,
        )
        # Every process drops other values.
        if processes.rank() > 0 and self.resume_step is None:
            torch.manual_seed(self.config.optimization.seed + _RANK_SEEDS * processes.rank())

    def _take_output_dir(self) -> Path:
        self.lock.take()
        # It may hold by now what another run has left there meanwhile.
        directory = make_output_dir(self.config)
        if self.resume_step is not None:
            set_aside(directory, self.resume_step)
        return directory

    def _new_best(self) -> BestModel | None:
        options = self.config.run
        if not options.load_best_model_at_end:
            return None
        if not self.data.evaluation_splits:
            raise ValueError(
                f"load_best_model_at_end: {self.data.name} has no labelled split to choose by."
            )
        layers = scored_layers(self.model.exit_layers, self.stages[-1].exits)
        return BestModel(options, self.data.metrics, layers)

    def _check_profile(self) -> int:
        """How many steps to profile, which the stage must have after those that warm up."""
        num_steps = self.config.run.profile
        left = self.stage_ends[self.stage_index] - self.step
        if num_steps and WARM_UP + num_steps > left:
            of_what = "stage" if len(self.stages) > 1 else "run"
            most = left - WARM_UP
            remedy = f"Profile at most {most}." if most > 0 else "Profile a longer one."
            raise ValueError(
                f"profile={num_steps}: this {of_what} has {left} steps to do, the first "
                f"{WARM_UP} of which warm up. {remedy}"
            )
        return num_steps

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
        if processes.world_size() > len(self.train_split):
            raise ValueError(
                f"{processes.world_size()} processes for {len(self.train_split)} training texts: "
                "start at most one for each."
            )
        self.batch_size = options.per_device_train_batch_size * processes.world_size()
        num_batches = math.ceil(len(self.train_split) / self.batch_size)
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
        self.features: FeatureCache | None = None
        num_steps = self.stage_ends[index] - self.stage_start
        groups = prepare(self.model, self.stage)
        # Before the engine, which may shard the backbone.
        self._open_features()
        settings: dict[str, Any] = {
            "groups": groups,
            # On a frozen backbone the exits have nothing in common.
            "independent": not self.stage.trains_backbone,
            "learning_rate": self.stage.learning_rate,
            # Exits alone are small and near: the exact decision costs them nothing to speak of.
            "gate_scope": self.config.objective.gate_scope if self.stage.trains_backbone else "all",
        }
        self.engine: Engine
        if self.uses_deepspeed:
            from ..backends.deepspeed.backend import DeepSpeedEngine

            self.engine = DeepSpeedEngine(
                self.model,
                self.config,
                num_steps,
                self.device,
                deepspeed_config=self.deepspeed_config,
                optimizer=self.config.optimization.optimizer,
                **settings,
            )
        else:
            self.engine = LocalEngine(self.model, self.config, num_steps, self.device, **settings)
        self.losses = StepLosses(
            self.model,
            self.stage,
            self.config,
            self.train_split,
            self.engine,
            pad_token_id=self.tokenizer.pad_token_id,
            device=self.device,
            features=self.features,
        )

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
            dtype=self.dtype,
            progress=not self.config.run.disable_tqdm and processes.rank() == 0,
        )

    def _resume(self, name: str) -> None:
        output_dir = Path(str(self.config.run.output_dir))

        def find() -> Path:
            if output_dir.is_dir():
                self.lock.take()
                tidy(output_dir)
            return find_checkpoint(output_dir, name)

        # One looks for all: a checkpoint is gigabytes, and they must agree on it.
        checkpoint = collectives.from_first(find)

        def load() -> dict[str, Any]:
            check_same_run(output_dir, self.config)
            state = load_state(checkpoint, processes.rank(), processes.world_size())
            check_own(checkpoint, state, self.config)
            try:
                self.model.load_state_dict(load_trained(str(checkpoint)).state_dict())
            except RuntimeError as error:
                raise ValueError(f"{str(checkpoint)!r} holds another model: {error}") from None
            return state

        state = collectives.together(load)
        if self.best is not None:
            self.best.load_state_dict(state["best"])
            collectives.from_first(self._check_best)
        self._start_stage(state["stage_index"])
        self.engine.load_state_dict(state["engine"])
        self.history.load_state_dict(state["history"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step = self.resume_step = state["step"]
        self.seconds = state["seconds"]
        self.resume_evaluated = state["evaluated"]
        logger.info("Resuming from %s at step %d of %d.", checkpoint, self.step, self.num_steps)

    def _check_best(self) -> None:
        """Refuse to go on where the best checkpoint so far, which may be the end's, is lost."""
        if self.best is None or self.best.step is None:
            return
        checkpoint = checkpoint_of(Path(str(self.config.run.output_dir)), self.best.step)
        problem = fault(checkpoint)
        if problem is not None:
            raise ValueError(
                f"load_best_model_at_end: the best checkpoint so far is lost ({problem}). Resume "
                "without load_best_model_at_end, or from a checkpoint before it."
            )

    def run(self) -> dict[str, Any]:
        """Train, evaluate and save; see `train`."""
        try:
            return self._run()
        finally:
            self.lock.release()

    def _run(self) -> dict[str, Any]:
        self.prepare()
        options = self.config.run
        logger.info(
            "%s: %d training texts, %d classes; %d steps (%d an epoch) on %s in %s.",
            self.data.name,
            len(self.train_split),
            len(self.data.label_names),
            self.num_steps,
            self.steps_per_epoch,
            self.device.type,
            str(self.dtype).removeprefix("torch."),
        )
        self.started = time.monotonic()
        with (
            self._log() as log,
            self.profiler,
            self.signals,
            tqdm(
                total=self.num_steps,
                initial=self.step,
                desc=f"train {self.config.objective.objective}",
                # None: no bar where the output is not a terminal.
                disable=True if options.disable_tqdm or processes.rank() > 0 else None,
            ) as bar,
        ):
            # A checkpoint is saved after the evaluation of the same step.
            evaluations = collectives.from_first(lambda: log.evaluations(self.step))
            evaluated = self.step if evaluations else -1
            for epoch, windows in self._epochs():
                for window in windows:
                    with self.profiler.step():
                        self._train_step(epoch, window, log, bar)
                    if self._due(options.eval_steps):
                        evaluations = self._evaluate(log)
                        evaluated = self.step
                    # A signal reaches the processes at different steps; they stop at the same one.
                    number = collectives.largest(self._signalled(), self.device)
                    is_due = self._due(options.save_steps)
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
            # A run of several processes has its weights in parts until then.
            self.engine.close()
            if self.best is not None and self.best.step not in (None, self.step):
                evaluations = self._take_best(self.best.step, log)
            results = self._results(evaluations)
            if processes.rank() == 0:
                self._save_final(results)
            processes.barrier()
        return results

    def _consider(self, evaluations: dict[str, Any]) -> None:
        """Compare an evaluation of the last stage with the best one so far."""
        if self.best is not None and self.stage is self.stages[-1]:
            self.best.consider(self.step, evaluations[self.data.evaluation_splits[0]])

    def _take_best(self, step: int, log: Log) -> dict[str, Any]:
        """Make the model that of the best checkpoint; returns its evaluations."""
        checkpoint = checkpoint_of(self.output_dir, step)
        trained = collectives.together(lambda: load_trained(str(checkpoint)))
        self.model.load_state_dict(trained.state_dict())
        logger.info("The final model is that of step %d, the best one.", step)
        return collectives.from_first(lambda: log.evaluations(step))

    def _signalled(self) -> int:
        """The signal that came; SIGTERM too where the launcher is gone, so that none trains on."""
        received = self.signals.received
        if received is None and self.peers is not None and self.peers.launcher_is_gone():
            self.signals.received = received = signal.SIGTERM
            logger.warning("The launcher has ended: saving after this step …")
        return received or 0

    def _log(self) -> MetricsLog | NoLog:
        if processes.rank() > 0:
            return NoLog()
        return MetricsLog(
            self.output_dir, self.config.run.report_to, self.resume_step, self.resume_evaluated
        )

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
                self.engine.close()
                self._start_stage(self.stage_index + 1)
            epoch, first = divmod(self.step - self.stage_start, self.steps_per_epoch)
            batches = epoch_batches(
                self.train_split.lengths,
                self.batch_size,
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

    def _train_step(self, epoch: int, window: list[np.ndarray], log: Log, bar: tqdm[Any]) -> None:
        started = time.monotonic()
        num_samples = sum(len(indices) for indices in window)
        self.step += 1
        every = self.config.objective.gate_agreement_steps
        compare = every > 0 and self.step % every == 0 and self.stage.trains_backbone
        values = []
        for weighted in self.losses.of(epoch, self.step, window):
            self.engine.backward(weighted)
            values.append(weighted.values())
        try:
            report = self.engine.step(compare=compare)
        except FloatingPointError as error:
            raise FloatingPointError(f"Step {self.step}: {error}") from None
        if report.decision is not None and not report.skipped:
            self._remember(epoch, report.decision)
        bar.update()
        due = self.step % self.config.run.logging_steps == 0 or self.step in self.stage_ends
        if due or compare:
            record = self._record(epoch, torch.stack(values).sum(0), report)
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
            agreements(decision),
            strict=True,
        )
        for group, active, angle, kept, agreed in seen:
            if active:
                place = self.epochs_before + epoch
                self.history.add(place, group, angle, dropped=not kept, agreed=agreed)

    def _record(self, epoch: int, values: Tensor, report: StepReport) -> dict[str, Any]:
        """The line of metrics.jsonl for one optimizer step; losses are sums over the exits.

        `values`: `ExitLosses.values` of the step, as far as this process has a part in it.
        """
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "split": "train",
        }
        if len(self.stages) > 1:
            record["stage"] = self.stage.name
        main, cross_entropy, auxiliary = collectives.total(values)  # [E] each
        loss = main
        if self.config.objective.objective != "ce":
            weight = torch.full_like(main, self.config.objective.aux_weight)
            if report.decision is not None:
                record |= self._angles(report.decision)
                record |= comparison(report.decision)
                if not report.skipped:
                    weight *= self._kept(epoch, report.decision)
            loss = (1 - weight) * main + weight * auxiliary
            record |= {"loss_aux": auxiliary.sum().item(), "aux_weight": weight.mean().item()}
        record |= {
            "loss": loss.sum().item(),
            "loss_ce": cross_entropy.sum().item(),
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

    def _evaluate(self, log: Log) -> dict[str, Any]:
        """Split -> layer -> metrics, for every evaluation split."""
        results = {}
        for name in self.data.evaluation_splits:
            try:
                by_layer = evaluate_split(
                    self.model,
                    self.encoded[name],
                    self.data.metrics,
                    self.config.optimization.per_device_eval_batch_size,
                    pad_token_id=self.tokenizer.pad_token_id,
                    context=self.engine.forward_context,
                    # Before their stage exits hold random weights.
                    positions=None if self.stage is self.stages[-1] else self.stage.exits,
                    progress=not self.config.run.disable_tqdm and processes.rank() == 0,
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"Step {self.step}, {name}: {error}") from None
            results[name] = by_layer
            for layer, metrics in by_layer.items():
                place = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4)}
                log.write({**place, "split": name, "exit": layer, "metrics": metrics})
        return results

    def _save_checkpoint(self, *, evaluated: bool) -> Path:
        """`evaluated`: this step's evaluations are in metrics.jsonl."""
        if processes.rank() == 0:
            # A checkpoint without the records before it would leave a gap in them.
            flush(self.output_dir / "metrics.jsonl")
        state = {
            "step": self.step,
            "world_size": processes.world_size(),
            "stage_index": self.stage_index,
            "engine": self.engine.state_dict(),
            "history": self.history.state_dict(),
            "rng": torch.get_rng_state(),
            "seconds": self.seconds + time.monotonic() - self.started,
            "options": lasting_options(self.config),
            "best": None if self.best is None else self.best.state_dict(),
            "evaluated": evaluated,
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return save_checkpoint(
            self.output_dir,
            self.step,
            self.model,
            self.engine.full_state_dict(),
            self.tokenizer,
            state,
            self.config.run.save_total_limit,
            None if self.best is None else self.best.step,
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
        best = {} if self.best is None else {"best": self.best.result()}
        return {
            "data": self.data.name,
            "objective": self.config.objective.objective,
            "strategy": self.config.optimization.strategy,
            "seed": self.config.optimization.seed,
            "metrics": evaluations,
            **best,
            "gate": self.history.summary(),
            "num_steps": self.num_steps,
            "train_seconds": round(self.seconds, 2),
            "train_samples_per_second": round(samples / self.seconds, 2),
            "command": command_line(self.given, "fusedacl train"),
            "options": lasting_options(self.config),
            "versions": versions(),
        }
