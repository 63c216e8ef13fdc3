"""Parts that all model cards share: the hub's metadata, and the command and versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def front_matter(base_model: str | None = None, metrics: Sequence[str] = ()) -> list[str]:
    """The hub's metadata block, as the first lines of a model card.

    base_model: its name on the hub, None if it has none.
    """
    metadata = {
        "library_name": "fusedacl",
        "pipeline_tag": "text-classification",
        "base_model": base_model,
        "tags": ["text-classification", "aligned-contrastive-learning"],
        "metrics": list(metrics),
    }
    known = {name: value for name, value in metadata.items() if value}
    return ["---", yaml.safe_dump(known, sort_keys=False).rstrip(), "---", ""]


def made_with(results: Mapping[str, Any]) -> list[str]:
    """The command and the package versions of a run, from its results."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return ["```", results["command"], "```", "", f"Versions: {versions}."]
