"""The front matter that model cards share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

_METADATA = {"library_name": "fusedacl", "pipeline_tag": "text-classification"}
_TAGS = ["text-classification", "aligned-contrastive-learning"]


def front_matter(metadata: Mapping[str, Any]) -> list[str]:
    """The hub's metadata."""
    return ["---", yaml.safe_dump(dict(metadata), sort_keys=False).rstrip(), "---", ""]


def made_with(results: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return ["```", results["command"], "```", "", f"Versions: {versions}."]
