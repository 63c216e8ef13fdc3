"""ONNX files of a model's segments: written, compared with PyTorch, and quantised."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...model.early_exit import EarlyExit
from ...runtime.text import first_line
from .decisions import clear_texts
from .onnx_early_exit import NEXT
from .segments import Segment, example_inputs, follow

# Largest error of logits and states, relative to the largest value where that is above 1.
MAX_ERROR = 1e-4
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_BY_TOKEN = ("input_ids", "hidden_states", "attention_mask", "token_type_ids")
# Batches (texts, tokens) on which every graph is compared with PyTorch.
_PROBES = ((1, 1), (1, 9), (3, 12), (24, 10))


def require_onnx() -> None:
    """Refuse to go on without the packages of the extra `onnx`.

    Raises:
        ValueError: one is missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"Export to ONNX needs {', '.join(missing)}. Run: pip install 'fusedacl[onnx]'"
        )


def write_segment(segment: Segment, inputs: tuple[Tensor, ...], file: Path) -> None:
    """Write the graph of a segment, for any number and length of texts; `inputs`: an example.

    Raises:
        ValueError: the encoder cannot be recorded as a graph.
    """
    any_size = torch.export.Dim.DYNAMIC
    shapes = [
        {0: any_size, 1: any_size} if name in _BY_TOKEN else {0: any_size}
        for name in segment.ports.inputs
    ]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                segment,
                inputs,
                str(file),
                dynamo=True,
                dynamic_shapes=(tuple(shapes),),
                input_names=list(segment.ports.inputs),
                output_names=list(segment.ports.outputs),
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        # The exporter wraps whatever the encoder's code raised.
        model_type = segment.backbone.config.model_type
        raise ValueError(
            f"A {model_type} encoder cannot be exported to ONNX with this version of PyTorch "
            f"({torch.__version__}): {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        logger.setLevel(level)


def write_segments(engine: EarlyExit, segments: Sequence[Segment], files: Sequence[Path]) -> None:
    """Write the graphs of all segments.

    Raises:
        ValueError: as `write_segment`.
    """
    inputs = example_inputs(engine)
    with torch.no_grad():
        for segment, file in zip(segments, files, strict=True):
            write_segment(segment, inputs, file)
            inputs = follow(inputs, segment(*inputs))


def differences(
    engine: EarlyExit, segments: Sequence[Segment], files: Sequence[Path]
) -> tuple[float, int]:
    """Differences between the graphs and PyTorch on texts of random tokens.

    Returns the largest error of logits and states, relative to the largest value where that is
    above 1, and the number of decisions (who leaves, and what the policy remembers) that differ on
    clear texts. Every graph gets PyTorch's inputs.
    """
    import onnxruntime

    sessions = [
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for file in files
    ]
    worst, num_wrong = 0.0, 0
    for num_texts, length in _PROBES:
        inputs = example_inputs(engine, num_texts, length)
        for segment, session in zip(segments, sessions, strict=True):
            with torch.no_grad():
                expected = segment(*inputs)
            fed = {
                name: value.numpy()
                for name, value in zip(segment.ports.inputs, inputs, strict=True)
            }
            found = session.run(list(segment.ports.outputs), fed)
            real = inputs[1].bool()
            clear, _ = clear_texts(segment, inputs)
            differs = torch.zeros_like(clear)
            for name, want, array in zip(segment.ports.outputs, expected, found, strict=True):
                have = torch.from_numpy(array)
                if not want.is_floating_point():
                    differs |= (have != want).reshape(num_texts, -1).any(dim=-1)
                    continue
                if name == NEXT + "hidden_states":
                    # Padding is never read.
                    have, want = have[real], want[real]
                error = (have - want).abs().max() / want.abs().max().clamp(min=1)
                worst = max(worst, float(error.nan_to_num(nan=torch.inf)))
            num_wrong += int((differs & clear).sum())
            inputs = follow(inputs, expected)
    return worst, num_wrong


def quantise(file: Path) -> None:
    """Replace a graph by one with int8 weights; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = file.with_suffix(".float32.onnx")
    file.rename(whole)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        quantize_dynamic(str(whole), str(file), weight_type=QuantType.QInt8, per_channel=True)
    finally:
        root.setLevel(level)
        whole.unlink()
