"""Fine-tuning BERT-like encoders with Aligned Contrastive Learning (arXiv 2602.03563)."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.deepspeed.zero_gate import ZeroGate as ZeroGate
    from .config.commands import EvaluationConfig as EvaluationConfig
    from .config.commands import ExitsConfig as ExitsConfig
    from .config.commands import ExportConfig as ExportConfig
    from .config.commands import PredictionConfig as PredictionConfig
    from .config.training import TrainingConfig as TrainingConfig
    from .inference.calibration.study import study_exits as study_exits
    from .inference.evaluation import evaluate as evaluate
    from .inference.export.command import export_model as export_model
    from .inference.export.onnx_early_exit import OnnxEarlyExit as OnnxEarlyExit
    from .inference.prediction import predict as predict
    from .integrations.arguments import ACLTrainingArguments as ACLTrainingArguments
    from .integrations.metric_learning import MetricSupConLoss as MetricSupConLoss
    from .integrations.monitor import AngleMonitor as AngleMonitor
    from .integrations.sentence_loss import SentenceSupConLoss as SentenceSupConLoss
    from .integrations.trainer import ACLTrainer as ACLTrainer
    from .model.early_exit import EarlyExit as EarlyExit
    from .model.early_exit import early_exit as early_exit
    from .model.multi_exit import MultiExitConfig as MultiExitConfig
    from .model.multi_exit import (
        MultiExitForSequenceClassification as MultiExitForSequenceClassification,
    )
    from .objectives.gate import GateDecision as GateDecision
    from .objectives.gate import GradientGate as GradientGate
    from .objectives.memory import MemoryBank as MemoryBank
    from .training.run import train as train

# Public name -> module, taken from the imports above, which only type checkers execute: torch and
# transformers take seconds to import and are imported when a name is first used.
_MODULES = {
    alias.name: node.module
    for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and node.level
    for alias in node.names
}
# An import of all names must not need what is not installed.
__all__ = sorted(
    name
    for name in _MODULES
    if name != "MetricSupConLoss" or find_spec("pytorch_metric_learning") is not None
)

# After `import fusedacl.engine`, transformers' AutoClasses and pipelines load the models.
import_module(".model.auto_classes", __name__).register()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
