"""Fine-tuning BERT-like encoders with Aligned Contrastive Learning (arXiv 2602.03563)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EvaluationConfig, ExitsConfig, PredictionConfig, TrainingConfig
    from .early_exiting import EarlyExit, early_exit
    from .evaluation import evaluate
    from .exit_study import study_exits
    from .gate import GateDecision, GradientGate
    from .modeling import MultiExitConfig, MultiExitForSequenceClassification
    from .prediction import predict
    from .trainer import train

__all__ = [
    "EarlyExit",
    "EvaluationConfig",
    "ExitsConfig",
    "GateDecision",
    "GradientGate",
    "MultiExitConfig",
    "MultiExitForSequenceClassification",
    "PredictionConfig",
    "TrainingConfig",
    "early_exit",
    "evaluate",
    "predict",
    "study_exits",
    "train",
]

_HOMES = {
    "EarlyExit": "early_exiting",
    "EvaluationConfig": "config",
    "ExitsConfig": "config",
    "GateDecision": "gate",
    "GradientGate": "gate",
    "MultiExitConfig": "modeling",
    "MultiExitForSequenceClassification": "modeling",
    "PredictionConfig": "config",
    "TrainingConfig": "config",
    "early_exit": "early_exiting",
    "evaluate": "evaluation",
    "predict": "prediction",
    "study_exits": "exit_study",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: torch and transformers take seconds, and a mistyped flag none.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
