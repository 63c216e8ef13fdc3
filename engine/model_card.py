"""The README.md of a final model: what it is, how it was made, what it scored."""

from __future__ import annotations

from typing import Any

import yaml

from .config import TrainingConfig

_OBJECTIVES = {
    "ce": "cross-entropy",
    "scl": "cross-entropy and supervised contrastive loss (CE+SCL)",
    "acl": "cross-entropy and aligned contrastive loss (ACL, arXiv 2602.03563)",
}


def model_card(config: TrainingConfig, base_model: str, results: dict[str, Any]) -> str:
    """A model card with the hub's metadata, from a run's configuration and results."""
    objective = _OBJECTIVES[config.objective.objective]
    if config.gated:
        objective += f", gated at {config.objective.max_angle:g} degrees (ACL-Grad)"
    names = {name for scores in _scores(results) for name in scores if name != "loss"}
    metadata = {
        "library_name": "fusedacl",
        "pipeline_tag": "text-classification",
        "base_model": base_model,
        "tags": ["text-classification", "aligned-contrastive-learning"],
        "metrics": sorted(names),
    }
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).rstrip(), "---", ""]
    lines += [f"# {base_model} fine-tuned on {results['data']}", ""]
    lines += [f"- Base model: {base_model}", f"- Data: {results['data']}"]
    lines += [f"- Objective: {objective}", f"- Strategy: {config.optimization.strategy}"]
    lines += [f"- Steps: {results['num_steps']}, seed {config.optimization.seed}", ""]
    lines += ["## Scores after the last step", ""]
    for split, by_layer in results["metrics"].items():
        for layer, scores in by_layer.items():
            words = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            lines.append(f"- {split}, exit at layer {layer}: {words}")
    if not results["metrics"]:
        lines.append("There was no labelled split to evaluate on.")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines += [
        "",
        "## Made with",
        "",
        "```",
        results["command"],
        "```",
        "",
        f"Versions: {versions}.",
    ]
    lines += ["", "## Use", "", "```python"]
    lines += ["from fusedacl.engine import MultiExitForSequenceClassification", ""]
    lines += ['model = MultiExitForSequenceClassification.from_pretrained("this directory")', "```"]
    return "\n".join(lines) + "\n"


def _scores(results: dict[str, Any]) -> list[dict[str, float]]:
    return [scores for by_layer in results["metrics"].values() for scores in by_layer.values()]
