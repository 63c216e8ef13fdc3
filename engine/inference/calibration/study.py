"""`fusedacl exits`: quality and speed of early exit by policy, and the choice of a policy."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

from ...config.commands import ExitsConfig
from ...config.fields import command_line
from ...model.early_exit import check_has_earlier_exits
from ...model.exit_policies import Learned, Policy
from ...model.multi_exit import MultiExitConfig
from ...runtime.device import dtype_name
from ...runtime.files import check_writable, flush, write_json
from ...runtime.machine import machine_name, versions
from ...runtime.manifest import check_not_sealed, publish_model, seal_model
from ...runtime.plots import require_matplotlib
from ...runtime.text import did_you_mean, text_table
from ..evaluation import load_labelled
from .card import write_early_exit
from .cross_fitting import cross_fit
from .figures import draw_quality_speed, write_speed_tables
from .guarantee import RISKS, choose_certified
from .learned_exit import NUM_FOLDS, with_learned_exit, with_separate_learned_exit
from .readings import ExitReadings, read_exits
from .request import (
    check_new,
    check_risk,
    for_exits,
    for_several_labels,
    policy_names,
    promise_of,
    target_of,
)
from .search import (
    AREA_WORDS,
    SweepRow,
    area_under_curve,
    calibration_record,
    choose,
    policy_grid,
    spread_out,
    sweep,
)
from .timing import MEASURED_BATCH_SIZES, MeasuredSpeed, measure_speed

logger = logging.getLogger("fusedacl")
# Settings of a policy that are timed: enough to show the shape of its curve.
MAX_TIMED_SETTINGS = 6
_DEFAULT_SAMPLES = ExitsConfig().exits.measured_samples


def study_exits(config: ExitsConfig) -> dict[str, Any]:
    """Try policies on the first evaluation split; calibrate and store one if asked to.

    Returns the score of the full model; for each policy its chosen setting, its area under the
    curve and times (`measured`: of the chosen setting; `timed`: of all timed settings, with scores
    and costs); and `lines` to print. Results so far are also written to exits.json in `output_dir`,
    with tables and a figure. After a KeyboardInterrupt they are returned, and `complete` is false.

    Raises:
        ValueError: a mistake in the options, the data or the model; the policy to store does not
            reach the target.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    return ExitStudy(config).run()


class ExitStudy:
    """A study of policies; the constructor checks all options before any work."""

    def __init__(self, config: ExitsConfig) -> None:
        self.config, self.options = config, config.exits
        self.names = policy_names(config)
        self.target = target_of(config)
        self.promise = promise_of(config, self.target)
        if not self.options.measure and self.options.measured_samples != _DEFAULT_SAMPLES:
            raise ValueError(
                f"measured_samples={self.options.measured_samples} belongs to measure: add "
                "--measure, or leave it out."
            )
        self.model_dir = Path(config.model.model_name_or_path or "")
        is_named = config.model.model_name_or_path is not None
        if self.options.policy is not None and is_named:
            if not self.model_dir.is_dir():
                raise ValueError(
                    f"policy is stored with the model: {str(self.model_dir)!r} is not a local "
                    "directory."
                )
            check_not_sealed(self.model_dir)
            check_writable(self.model_dir, "model_name_or_path", directory=True)
        self.output_dir = None
        if self.options.output_dir is not None:
            self.output_dir = Path(self.options.output_dir)
            check_writable(self.output_dir, "output_dir", directory=True)
            require_matplotlib()
        self.trained, data = load_labelled(config.model, config.data, "calibrate")
        check_has_earlier_exits(self.trained.model)
        self.names = for_exits(self.names, config, len(self.trained.model.exit_layers))
        if data.several_labels:
            self.names = for_several_labels(self.names, config)
        self.metric = data.metrics[0] if self.options.metric is None else self.options.metric
        if self.metric not in data.metrics:
            raise ValueError(
                f"metric={self.metric!r} is no metric of this task."
                f"{did_you_mean(self.metric, data.metrics)}"
            )
        if self.metric == "average_precision":
            raise ValueError(
                "metric=average_precision ranks texts by their probabilities, which exits give on "
                "scales of their own: use micro_f1, macro_f1 or exact_match."
            )
        if self.promise is not None:
            check_risk(self.promise.risk, self.metric, data.metrics)
        split = data.evaluation_splits[0]
        self.data_name = f"{data.name}, {split}"
        check_new(self.trained.record, data.splits[split], self.data_name, self.promise)
        self.encoded = self.trained.encode(data.splits[split], split)
        if self.promise is not None:
            self.promise.check_number(len(self.encoded))
        self.curves: dict[str, list[SweepRow]] = {}
        self.chosen: dict[str, SweepRow] = {}
        self.to_time: dict[str, list[SweepRow]] = {}
        self.measured: dict[Policy, tuple[MeasuredSpeed, ...]] = {}
        self.is_stored = False

    def run(self) -> dict[str, Any]:
        """Try all policies, then time some settings of each; see `study_exits`."""
        trained, progress = self.trained, not self.config.model.disable_tqdm
        self.readings = read_exits(
            trained.model,
            self.encoded,
            self.config.model.per_device_eval_batch_size,
            pad_token_id=trained.tokenizer.pad_token_id,
            dtype=trained.dtype,
            progress=progress,
            keep_embeddings=Learned.name in self.names,
        )
        self.learned_readings = None
        if Learned.name in self.names:
            with_layer = with_learned_exit if self.promise is None else with_separate_learned_exit
            try:
                self.learned_readings = with_layer(self.readings)
            except ValueError as error:
                if self.options.policy == Learned.name or self.names == [Learned.name]:
                    raise
                self.names.remove(Learned.name)
                logger.warning(f"learned: left out. {error}")
        self.results: dict[str, Any] = {
            "data": self.data_name,
            "num_samples": len(self.readings),
            "dtype": dtype_name(trained.dtype),
            "max_seq_length": trained.max_length,
            "exit_layers": self.readings.exit_layers,
            "metric": self.metric,
            "full_score": self.readings.score(self.metric),
            "policies": {},
            "machine": machine_name(trained.device),
            "versions": versions(),
            "command": command_line(self.config, "fusedacl exits"),
            "complete": False,
        }
        try:
            for name in self.names:
                self._sweep(name)
                self._save()
            if self.options.measure:
                self._draw()
                # The policy to store first, whose times matter most.
                for name in sorted(self.to_time, key=lambda name: name != self.options.policy):
                    self._measure(name)
                    self._save()
            self.results["complete"] = True
        except KeyboardInterrupt:
            pass
        self._save()
        self._draw()
        return {**self.results, "lines": self._lines()}

    def _sweep(self, name: str) -> None:
        """Try the settings of a policy and choose one for the target; store it if asked to."""
        readings, metric = self.readings, self.metric
        if name == Learned.name and self.learned_readings is not None:
            readings = self.learned_readings
        num_thresholds = self.options.num_thresholds
        rows = sweep(readings, policy_grid(name, readings, num_thresholds), metric)
        found: dict[str, Any] = {"area_under_curve": area_under_curve(rows, readings, metric)}
        guarantee = None
        try:
            if self.promise is None:
                chosen = choose(rows, readings.score(metric), self.target)
            else:
                chosen, guarantee = choose_certified(
                    name, readings, metric, self.promise, num_thresholds=num_thresholds
                )
                rows += [] if chosen in rows else [chosen]
        except ValueError as error:
            words = str(error)
            if name == Learned.name and self.promise is not None:
                words += " Only half of the texts given are tested; the others fit its layer."
            if name == self.options.policy:
                raise ValueError(words) from None
            logger.info(f"{name}: {words}")
        else:
            if chosen.flops_share > 1:
                logger.warning(
                    f"{name}: no setting within the target saves operations; {chosen.policy} "
                    f"takes {chosen.flops_share:.1%} of the full model's."
                )
            found |= self._record(name, chosen, readings, guarantee)
            self.chosen[name] = chosen
        self.curves[name] = rows
        if self.output_dir is not None:
            self.to_time[name] = spread_out(rows, MAX_TIMED_SETTINGS, self.chosen.get(name))
        elif name in self.chosen:
            # Without files, only the times of the chosen setting are shown.
            self.to_time[name] = [self.chosen[name]]
        self.results["policies"][name] = found
        if name == self.options.policy:
            self._store(found)

    def _record(
        self,
        name: str,
        chosen: SweepRow,
        readings: ExitReadings,
        guarantee: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """The record of a policy's chosen setting, with its cross-fitted score or its guarantee."""
        record = calibration_record(
            chosen,
            readings,
            data=self.data_name,
            metric=self.metric,
            target=self.target,
            dtype=self.trained.dtype,
            max_seq_length=self.trained.max_length,
        )
        facts = record["calibration"]
        if name == Learned.name:
            # See `learned_exit.with_learned_exit`.
            facts["learned_exit"] = {"fitted_on": self.data_name}
            if guarantee is None:
                facts["learned_exit"]["num_folds"] = NUM_FOLDS
            else:
                # The guarantee's texts are the others.
                facts["learned_exit"]["num_texts"] = len(self.readings) - len(readings)
        facts["cross_fitted"] = None
        if guarantee is not None:
            # It holds for new texts, which a cross-fitted score would only estimate.
            facts["guarantee"] = {**guarantee, "weights": self.trained.weights_hash()}
            return record
        try:
            scored = cross_fit(
                name,
                readings,
                self.metric,
                self.target,
                num_thresholds=self.options.num_thresholds,
            )
            facts["cross_fitted"] = dataclasses.asdict(scored)
        except ValueError as error:
            logger.info(f"{name}, cross-fitted: {error}")
        return record

    def _store(self, record: dict[str, Any]) -> None:
        """Write the policy into the model's configuration and card."""
        kept = {name: record[name] for name in ("name", "parameters", "calibration")}
        self.trained.model.config.exit_policy = kept
        # A full disk must not cost the model, of which this may be the only copy.
        with tempfile.TemporaryDirectory(prefix=".policy-", dir=self.model_dir) as made:
            if self.options.policy == Learned.name:
                self.trained.model.save_pretrained(made)
            else:
                # Only the configuration changes: a learned exit that was fitted for the study is
                # not stored.
                on_disk = MultiExitConfig.from_pretrained(self.model_dir)
                on_disk.exit_policy = kept
                on_disk.save_pretrained(made)
            for file in Path(made).iterdir():
                flush(file)
            publish_model(Path(made), self.model_dir)
        if self.options.policy == Learned.name:
            seal_model(self.model_dir)
        write_early_exit(self.model_dir / "README.md", self.results, kept["name"])
        self.is_stored = True

    def _measure(self, name: str) -> None:
        """Time the settings of a policy."""
        rows, found = self.to_time[name], self.results["policies"][name]
        by_size = [
            measure_speed(
                self.trained.model,
                self.encoded,
                [row.policy for row in rows],
                size,
                pad_token_id=self.trained.tokenizer.pad_token_id,
                dtype=self.trained.dtype,
                max_texts=self.options.measured_samples,
                progress=not self.config.model.disable_tqdm,
            )
            for size in MEASURED_BATCH_SIZES
        ]
        found["timed"] = []
        for row, speeds in zip(rows, zip(*by_size, strict=True), strict=True):
            self.measured[row.policy] = speeds
            measured = list(map(dataclasses.asdict, speeds))
            found["timed"].append(
                {
                    "parameters": row.policy.parameters,
                    "score": row.score,
                    "mean_layer": row.mean_layer,
                    "flops_share": row.flops_share,
                    "measured": measured,
                }
            )
            words = ", ".join(f"{s.speedup:.2f}x at batch {s.batch_size}" for s in speeds)
            logger.info(f"{row.policy}: {words}")
            if row == self.chosen.get(name):
                found["measured"] = measured
        logger.info(f"{self._num_timed()} of {len(self.to_time)} policies timed")
        if name == self.options.policy:
            write_early_exit(self.model_dir / "README.md", self.results, name)

    def _num_timed(self) -> int:
        return sum("timed" in found for found in self.results["policies"].values())

    def _save(self) -> None:
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_json(self.output_dir / "exits.json", self.results)

    def _draw(self) -> None:
        """Write tables and figure of the policies tried so far."""
        if self.output_dir is not None and self.curves:
            path, policies = self.output_dir / "exits", self.results["policies"]
            areas = {name: policies[name]["area_under_curve"] for name in self.curves}
            write_speed_tables(self.curves, areas, self.metric, path, self.measured)
            full_score = self.results["full_score"]
            draw_quality_speed(self.curves, full_score, self.metric, path, self.measured)

    def _lines(self) -> list[str]:
        """The output of the command: a table of the chosen settings and a legend."""
        results, metric = self.results, self.metric
        unseen = "cross-fitted" if self.promise is None else "lost"
        header = ["policy", "setting", metric, unseen, "mean layer", "FLOPs", "area"]
        if self.measured:
            header += [f"batch {size}" for size in MEASURED_BATCH_SIZES]
        table = [_row(found, name, len(header) - 7) for name, found in results["policies"].items()]
        lines = [
            f"full model: {metric} {results['full_score']:.4f} on {results['num_samples']} texts "
            f"({self.data_name}), {results['dtype']}, at most {results['max_seq_length']} tokens",
            text_table(header, table),
            f"{metric}: on the texts that the setting was chosen on. {self._unseen_words()}",
            f"area: {AREA_WORDS}.",
        ]
        if Learned.name in results["policies"]:
            texts = f"these texts ({self.data_name})"
            how = f"{texts}; each was scored by a layer fitted without it ({NUM_FOLDS} folds)"
            if self.promise is not None:
                how = f"half of {texts}; guarantee and scores are from the other half"
            lines.append(f"learned: its layer was fitted on {how}.")
        if self.measured:
            others = ""
            if self.output_dir is not None:
                others = f" Other settings' times are in {self.output_dir / 'exits.csv'}."
            lines.append(f"batch …: speed against the full model on {results['machine']}.{others}")
        if self.is_stored:
            lines.append(
                f"{self.options.policy} is stored with the model: `fusedacl predict --policy "
                "stored`."
            )
        if not results["complete"]:
            lines.append(self._interrupted())
        return lines

    def _unseen_words(self) -> str:
        """The legend of the column on texts that a setting was not chosen on."""
        if self.promise is None:
            return "cross-fitted: chosen on one half of them, scored on the other, both ways."
        return (
            f"lost: {RISKS[self.promise.risk]}; with confidence {self.promise.confidence:g} it is "
            f"at most {self.promise.limit:g} on new texts of the same source. Each row holds by "
            "itself: choose the policy before you see the table."
        )

    def _interrupted(self) -> str:
        where = "" if self.output_dir is None else f" Results so far are in {self.output_dir}."
        swept = f"{len(self.curves)} of {len(self.names)} policies were tried"
        timed = f", {self._num_timed()} of {len(self.to_time)} timed" * self.options.measure
        return f"Interrupted: {swept}{timed}.{where}"


def _row(found: dict[str, Any], name: str, num_speeds: int) -> list[str]:
    """The row of a policy in the table."""
    area = f"{found['area_under_curve']:.4f}"
    if "calibration" not in found:
        return [name, "target out of reach", "", "", "", "", area, *[""] * num_speeds]
    facts = found["calibration"]
    setting = " ".join(f"{key}={value:.4g}" for key, value in found["parameters"].items())
    unseen = "-"
    if facts["cross_fitted"] is not None:
        unseen = f"{facts['cross_fitted']['score']:.4f}"
    elif "guarantee" in facts:
        unseen = "{num_lost} of {num_texts}".format(**facts["guarantee"])
    speeds = [f"{speed['speedup']:.2f}x" for speed in found.get("measured", ())]
    return [
        name,
        setting,
        f"{facts['score']:.4f}",
        unseen,
        f"{facts['mean_layer']:.2f}",
        f"{facts['flops_share']:.0%}",
        area,
        *(speeds or [""] * num_speeds),
    ]
