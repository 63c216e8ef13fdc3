"""`fusedacl exits`: what early exit costs and brings, policy by policy, and the choice of one."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from .batching import encode
from .calibration import (
    SweepRow,
    Target,
    area_under_curve,
    calibration_record,
    choose,
    fit_learned_exit,
    policy_grid,
    read_exits,
    store_policy,
    sweep,
)
from .checkpoint import write_json
from .columns import TextSplit
from .config import ExitsConfig
from .data import load_splits
from .early_exiting import check_has_earlier_exits
from .exit_policies import Learned, Policy, policy_class
from .loading import TrainedModel
from .modeling import MultiExitConfig
from .options import did_you_mean
from .quality_speed import MeasuredSpeed, draw_quality_speed, measure_speed, write_tables
from .report import require_matplotlib, text_table

logger = logging.getLogger("fusedacl")
DEFAULT_MAX_QUALITY_LOSS = 0.01
MEASURED_BATCH_SIZES = (1, 32)


def study_exits(config: ExitsConfig) -> dict[str, Any]:
    """Sweep policies on the first evaluation split; calibrate and store one where asked to.

    Returns (and writes to exits.json in `output_dir`, with tables and figure) the full model's
    score, per policy its chosen setting, area under the curve and times, and printable `lines`.

    Raises:
        ValueError: a mistake in the options, the data or the model; a target out of reach of the
            policy to store.
    """
    options = config.exits
    names = [name.strip() for name in options.policies.split(",") if name.strip()]
    if options.policy is not None and options.policy not in names:
        names.append(options.policy)
    for name in names:
        policy_class(name)
    if not names:
        raise ValueError("policies is empty: name one policy at least.")
    target = _target(config)
    path = (
        None if config.model.model_name_or_path is None else Path(config.model.model_name_or_path)
    )
    if options.policy is not None and path is not None and not path.is_dir():
        raise ValueError(f"policy is stored with the model: {str(path)!r} is no local directory.")
    output_dir = None if options.output_dir is None else Path(options.output_dir)
    if output_dir is not None:
        require_matplotlib()
    needs_training = Learned.name in names
    trained = TrainedModel(config.model, config.data.max_seq_length)
    check_has_earlier_exits(trained.model)
    data = load_splits(
        task_name=config.data.task_name,
        data_dir=config.data.data_dir,
        dataset_name=config.data.dataset_name,
        dataset_config_name=config.data.dataset_config_name,
        train_file=config.data.train_file,
        validation_file=config.data.validation_file,
        max_eval_samples=config.data.max_eval_samples,
        needs_train=needs_training,
        label_names=trained.label_names,
    )
    for note in data.notes:
        logger.info(note)
    if not data.evaluation_splits:
        raise ValueError(f"{data.name} has no labelled split to calibrate on.")
    metric = data.metrics[0] if options.metric is None else options.metric
    if metric not in data.metrics:
        raise ValueError(f"metric={metric!r}.{did_you_mean(metric, data.metrics)}")
    batch_size = config.model.per_device_eval_batch_size
    inference: dict[str, Any] = {
        "pad_token_id": trained.tokenizer.pad_token_id,
        "dtype": trained.dtype,
    }
    progress = not config.model.disable_tqdm
    if needs_training:
        texts = _last(data.splits["train"], config.data.learned_exit_samples)
        encoded = encode(texts, trained.tokenizer, trained.max_length, model_limit=trained.limit)
        fit_learned_exit(trained.model, encoded, batch_size, progress=progress, **inference)
    split = data.evaluation_splits[0]
    encoded = encode(
        data.splits[split], trained.tokenizer, trained.max_length, model_limit=trained.limit
    )
    readings = read_exits(trained.model, encoded, batch_size, progress=progress, **inference)
    full_score = readings.score(metric)
    curves: dict[str, list[SweepRow]] = {}
    policies: dict[str, dict[str, Any]] = {}
    measured: dict[Policy, list[MeasuredSpeed]] = {}
    for name in names:
        grid = policy_grid(name, readings, options.num_thresholds)
        curves[name] = sweep(readings, grid, metric)
        policies[name] = {"area_under_curve": area_under_curve(curves[name], readings, metric)}
        try:
            chosen = choose(curves[name], full_score, target)
        except ValueError as error:
            if name == options.policy:
                raise
            logger.info(f"{name}: {error}")
            continue
        record = calibration_record(
            chosen, readings, data=f"{data.name}, {split}", metric=metric, target=target
        )
        policies[name].update(record)
        if options.measure:
            logger.info("%s: measuring beside the full model …", name)
            measured[chosen.policy] = [
                measure_speed(trained.model, encoded, chosen.policy, size, **inference)
                for size in MEASURED_BATCH_SIZES
            ]
            policies[name]["measured"] = list(map(dataclasses.asdict, measured[chosen.policy]))
        if name == options.policy:
            assert path is not None  # TrainedModel has refused None
            store_policy(trained.model, record)
            if name == Learned.name:
                trained.model.save_pretrained(path)
            else:
                # The weights on disk are as they were, and so is their learned exit or its absence:
                # one that was fitted for the sweep is not among them.
                on_disk = MultiExitConfig.from_pretrained(path)
                on_disk.exit_policy = trained.model.config.exit_policy
                on_disk.save_pretrained(path)
    results = {"metric": metric, "full_score": full_score, "policies": policies}
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "exits.json", results)
        rows = [row for name in names for row in curves[name]]
        write_tables(rows, metric, output_dir / "exits", measured)
        draw_quality_speed(curves, full_score, metric, output_dir / "exits")
    return {**results, "lines": _lines(results, options.policy)}


def _target(config: ExitsConfig) -> Target:
    given = {
        name: getattr(config.exits, name)
        for name in ("max_quality_loss", "max_mean_layer", "max_flops_share")
        if getattr(config.exits, name) is not None
    }
    return Target(**(given or {"max_quality_loss": DEFAULT_MAX_QUALITY_LOSS}))


def _last(split: TextSplit, number: int) -> TextSplit:
    return TextSplit(
        split.first[-number:],
        None if split.second is None else split.second[-number:],
        None if split.labels is None else split.labels[-number:],
    )


def _lines(results: dict[str, Any], stored: str | None) -> list[str]:
    """What the command prints: a table of the chosen settings."""
    metric = results["metric"]
    header = ["policy", "setting", metric, "mean layer", "FLOPs", "area", "speed-up"]
    rows = []
    for name, found in results["policies"].items():
        area = f"{found['area_under_curve']:.4f}"
        if "calibration" not in found:
            rows.append([name, "target out of reach", "", "", "", area, ""])
            continue
        facts = found["calibration"]
        setting = " ".join(f"{key}={value:.4g}" for key, value in found["parameters"].items())
        speeds = [
            f"{speed['speedup']:.2f}x (batch {speed['batch_size']})"
            for speed in found.get("measured", ())
        ]
        rows.append(
            [
                name,
                setting,
                f"{facts['score']:.4f}",
                f"{facts['mean_layer']:.2f}",
                f"{facts['flops_share']:.0%}",
                area,
                ", ".join(speeds),
            ]
        )
    lines = [f"full model: {metric} {results['full_score']:.4f}", text_table(header, rows)]
    if stored is not None:
        lines.append(f"{stored} is stored with the model: `fusedacl predict --policy stored`.")
    return lines
