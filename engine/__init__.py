"""Fine-tuning BERT-like encoders with Aligned Contrastive Learning (arXiv 2602.03563)."""

from .config import EvaluationConfig, PredictionConfig, TrainingConfig
from .evaluation import evaluate
from .gate import GateDecision, GradientGate
from .modeling import MultiExitConfig, MultiExitForSequenceClassification
from .prediction import predict
from .trainer import train

__all__ = [
    "EvaluationConfig",
    "GateDecision",
    "GradientGate",
    "MultiExitConfig",
    "MultiExitForSequenceClassification",
    "PredictionConfig",
    "TrainingConfig",
    "evaluate",
    "predict",
    "train",
]
