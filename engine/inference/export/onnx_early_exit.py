"""Early exit on onnxruntime, from the directory that `fusedacl export` wrote.

Neither PyTorch nor transformers is imported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...runtime.manifest import fault

if TYPE_CHECKING:
    import onnxruntime

EXPORT_FILE = "early_exit.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = 1
# Batches whose texts are tokenised together.
_BATCHES_PER_CHUNK = 64
# Before the names of outputs that the next segment takes: a graph's outputs differ from its inputs.
NEXT = "next_"


@dataclass(frozen=True)
class OnnxAnswers:
    """Answers for n texts and K labels, in the order of the input.

    logits [n, K] float32, of the exit where the text left; exit_layers [n] int64, its layer.
    """

    logits: NDArray[np.float32]
    exit_layers: NDArray[np.int64]
    label_names: list[str]

    @property
    def predictions(self) -> NDArray[np.int64]:
        """Index of the class, int64 [n]."""
        answers: NDArray[np.int64] = self.logits.argmax(axis=-1)
        return answers

    @property
    def labels(self) -> list[str]:
        """Name of the class of each text."""
        return [self.label_names[index] for index in self.predictions]

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """Softmax of the logits, float32 [n, K]."""
        shifted = np.exp(self.logits - self.logits.max(axis=-1, keepdims=True))
        values: NDArray[np.float32] = shifted / shifted.sum(axis=-1, keepdims=True)
        return values


class OnnxEarlyExit:
    """An exported model with its policy: call it with token ids, or `predict` texts.

    Args:
        directory: what `fusedacl export` wrote.
        num_threads: threads of an operation; None: onnxruntime's choice, one per core.
        providers: onnxruntime's execution providers, in the order of preference.

    Raises:
        ValueError: the directory holds no export, or a damaged one, or onnxruntime is missing.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        num_threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self.directory = Path(directory)
        self.record = _read_record(self.directory)
        self.label_names: list[str] = self.record["label_names"]
        self.policy: dict[str, Any] = self.record["policy"]
        self.exit_layers = [int(segment["layer"]) for segment in self.record["segments"]]
        self._sessions = [
            _session(self.directory / segment["file"], num_threads, list(providers))
            for segment in self.record["segments"]
        ]
        self._tokenizer: Any = None

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
    ) -> OnnxAnswers:
        """Answer one batch of right-padded token ids [N, T]; mask: 1 for tokens, 0 for padding.

        Raises:
            ValueError: an empty batch, arrays of other shapes, or padding that is not on the right.
            FloatingPointError: an answer is NaN.
        """
        return _finite(self._answers(input_ids, attention_mask, token_type_ids))

    def _answers(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None,
        token_type_ids: ArrayLike | None,
    ) -> OnnxAnswers:
        ids = np.asarray(input_ids, dtype=np.int64)
        mask = (
            np.ones_like(ids)
            if attention_mask is None
            else _like("attention_mask", attention_mask, ids)
        )
        lengths = _lengths(ids, mask)
        width = int(lengths.max())
        state = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.record["segments"][0]["inputs"]:
            types = np.zeros_like(ids) if token_type_ids is None else token_type_ids
            state["token_type_ids"] = _like("token_type_ids", types, ids)
        if width < ids.shape[1]:
            state = {name: np.ascontiguousarray(part[:, :width]) for name, part in state.items()}
        return self._run(state, lengths)

    def predict(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
    ) -> OnnxAnswers:
        """Answer texts, or pairs of texts; long ones are cut as in training.

        Raises:
            ValueError: no text, something else than text, fewer or more second texts than first
                ones, pairs where the model reads single texts (or the reverse), the export has no
                tokenizer, or the package tokenizers is missing.
            FloatingPointError: an answer is NaN.
        """
        if isinstance(texts, str) or not len(texts):
            raise ValueError("texts must be a list of at least one text.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch needs at least 1 text.")
        if pairs is not None and (isinstance(pairs, str) or len(pairs) != len(texts)):
            raise ValueError(f"pairs must be a list of {len(texts)} texts, one for each of texts.")
        is_pair = self.record["reads_pairs"]
        if is_pair is not None and is_pair != (pairs is not None):
            raise ValueError(
                "The model reads pairs of texts: give pairs too."
                if is_pair
                else "The model reads single texts: leave pairs out."
            )
        _check_texts("texts", texts)
        if pairs is not None:
            _check_texts("pairs", pairs)
        given: list[Any] = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        logits = np.empty((len(given), len(self.label_names)), dtype=np.float32)
        layers = np.empty(len(given), dtype=np.int64)
        chunk = _BATCHES_PER_CHUNK * batch_size
        for first in range(0, len(given), chunk):
            encoded = self.tokenizer.encode_batch(given[first : first + chunk])
            lengths = np.array([len(text.ids) for text in encoded])
            if not lengths.all():
                row = first + int(lengths.argmin())
                raise ValueError(f"texts[{row}] has no token: correct or remove it.")
            # Texts of similar length share a batch: less padding.
            order = np.argsort(-lengths, kind="stable")
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                answers = self._answers(
                    *self._collated([encoded[row] for row in rows], lengths[rows])
                )
                logits[first + rows] = answers.logits
                layers[first + rows] = answers.exit_layers
        return _finite(OnnxAnswers(logits, layers, self.label_names))

    def _collated(self, encoded: list[Any], lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Token ids, mask and token types [N, T] of tokenised texts, padded on the right."""
        shape = (len(encoded), int(lengths.max()))
        ids = np.full(shape, self.record["pad_token_id"], dtype=np.int64)
        mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, (text, length) in enumerate(zip(encoded, lengths, strict=True)):
            ids[row, :length], mask[row, :length] = text.ids, 1
            if self.record["gives_token_types"]:
                types[row, :length] = text.type_ids
        return [ids, mask, types]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer (of the package tokenizers), which cuts texts at the model's length.

        Raises:
            ValueError: the export has none, or the package is missing.
        """
        if self._tokenizer is None:
            file = self.directory / TOKENIZER_FILE
            if not file.is_file():
                raise ValueError(
                    f"{str(self.directory)!r} has no {TOKENIZER_FILE}: tokenise the texts yourself "
                    "and call the model with token ids."
                )
            try:
                from tokenizers import Tokenizer
            except ImportError:
                raise ValueError(
                    "OnnxEarlyExit.predict needs tokenizers. Run: pip install tokenizers (or "
                    "tokenise the texts elsewhere, and call the model with token ids)."
                ) from None
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_padding()
            tokenizer.enable_truncation(
                self.record["max_seq_length"], direction=self.record["truncation_side"]
            )
            self._tokenizer = tokenizer
        return self._tokenizer

    def _run(self, state: dict[str, Any], lengths: NDArray[np.int64]) -> OnnxAnswers:
        rows = np.arange(len(lengths))
        logits = np.empty((len(rows), len(self.label_names)), dtype=np.float32)
        layers = np.empty(len(rows), dtype=np.int64)
        mask = state["attention_mask"]
        segments = zip(self.record["segments"], self._sessions, strict=True)
        for segment, session in segments:
            outputs = dict(
                zip(segment["outputs"], session.run(segment["outputs"], state), strict=True)
            )
            found = outputs.pop("logits")
            if "leaves" not in outputs:
                logits[rows], layers[rows] = found, segment["layer"]
                break
            gone = outputs.pop("leaves")
            leaving = rows[gone]
            logits[leaving], layers[leaving] = found[gone], segment["layer"]
            if len(leaving) == len(rows):
                break
            kept = {name.removeprefix(NEXT): value for name, value in outputs.items()}
            state = {"attention_mask": mask, **kept}
            if len(leaving):
                rows, lengths = rows[~gone], lengths[~gone]
                width = int(lengths.max())
                state = {name: value[~gone] for name, value in state.items()}
                for name in ("attention_mask", "hidden_states"):
                    if width < state[name].shape[1]:
                        state[name] = np.ascontiguousarray(state[name][:, :width])
                mask = state["attention_mask"]
        return OnnxAnswers(logits, layers, self.label_names)


def _check_texts(name: str, texts: Sequence[Any]) -> None:
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"{name}[{row}]={text!r} is no text: correct or remove it. Second texts of pairs "
                "belong in pairs."
            )


def _finite(answers: OnnxAnswers) -> OnnxAnswers:
    """The answers, if they are numbers: the argmax of NaN is a class too."""
    (broken,) = np.nonzero(~np.isfinite(answers.logits).all(axis=-1))
    if len(broken):
        raise FloatingPointError(
            f"The export's answers to {len(broken)} of {len(answers.logits)} texts (the first has "
            f"index {broken[0]}) are NaN or infinite: its weights are damaged or the training "
            "diverged. Export another checkpoint."
        )
    return answers


def _session(
    file: Path, num_threads: int | None, providers: list[str]
) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(
            "OnnxEarlyExit needs onnxruntime. Run: pip install onnxruntime (to export as well: "
            "'fusedacl[onnx]')."
        ) from None
    options = onnxruntime.SessionOptions()
    # Each graph has threads of its own, which would wait on the cores that the next graph needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(str(file), options, providers=providers)


def _read_record(directory: Path) -> dict[str, Any]:
    """The manifest that `fusedacl export` wrote beside the graphs.

    Raises:
        ValueError: nothing, or something that is damaged or of a later version.
    """
    try:
        record = json.loads((directory / EXPORT_FILE).read_text(encoding="utf-8"))
        version = record["format"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{str(directory)!r} holds no {EXPORT_FILE}: name the output_dir of `fusedacl export`."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(directory / EXPORT_FILE)!r} is damaged ({error!r}): export again."
        ) from None
    if version != FORMAT:
        raise ValueError(
            f"{str(directory / EXPORT_FILE)!r} has the format {version}, this version of fusedacl "
            f"reads {FORMAT}: export again, or use the version that wrote it."
        )
    problem = fault(directory)
    if problem is not None:
        raise ValueError(f"{problem}: export again.")
    found: dict[str, Any] = record
    return found


def _like(name: str, values: ArrayLike, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    array = np.asarray(values, dtype=np.int64)
    if array.shape != ids.shape:
        raise ValueError(f"{name} has shape {list(array.shape)}, input_ids {list(ids.shape)}.")
    return array


def _lengths(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of each right-padded text, int64 [N]."""
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"input_ids has shape {list(ids.shape)}: it must be [texts, tokens].")
    real = mask.astype(bool)
    if not real[:, 0].all() or (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError(
            "attention_mask: padding must be on the right of each text, which has a token at least."
        )
    lengths: NDArray[np.int64] = real.sum(axis=1)
    return lengths
