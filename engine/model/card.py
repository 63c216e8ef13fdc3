"""Parts of all model cards: the metadata for the Hugging Face hub, and how the model was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData


def front_matter(**metadata: Any) -> list[str]:
    """Lines with the metadata by which the hub finds and shows a model."""
    data = ModelCardData(
        library_name="fusedacl",
        pipeline_tag="text-classification",
        tags=["text-classification", "aligned-contrastive-learning"],
        **metadata,
    )
    return ["---", data.to_yaml(), "---", ""]


def made_with(results: Mapping[str, Any]) -> list[str]:
    """Lines with the command that made a model, and the versions of the packages it used."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return ["```", results["command"], "```", "", f"Versions: {versions}."]
