"""Fine-tuning BERT-like encoders with Aligned Contrastive Learning (arXiv 2602.03563)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.commands import EvaluationConfig, ExitsConfig, PredictionConfig
    from .config.training import TrainingConfig
    from .inference.calibration.study import study_exits
    from .inference.evaluation import evaluate
    from .inference.prediction import predict
    from .model.early_exit import EarlyExit, early_exit
    from .model.multi_exit import MultiExitConfig, MultiExitForSequenceClassification
    from .objectives.gate import GateDecision, GradientGate
    from .training.run import train

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
    "EarlyExit": "model.early_exit",
    "EvaluationConfig": "config.commands",
    "ExitsConfig": "config.commands",
    "GateDecision": "objectives.gate",
    "GradientGate": "objectives.gate",
    "MultiExitConfig": "model.multi_exit",
    "MultiExitForSequenceClassification": "model.multi_exit",
    "PredictionConfig": "config.commands",
    "TrainingConfig": "config.training",
    "early_exit": "model.early_exit",
    "evaluate": "inference.evaluation",
    "predict": "inference.prediction",
    "study_exits": "inference.calibration.study",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: torch and transformers take seconds, and a mistyped flag none.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
