"""Tokenizers and trained models from a directory or the hub."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config.commands import InferenceOptions
from ..data.batching import EncodedSplit, encode, log_truncation
from ..data.columns import TextSplit
from ..data.record import DataRecord
from ..runtime.device import choose_device, choose_dtype
from ..runtime.manifest import MANIFEST_FILE, model_fault
from ..runtime.text import nearest_directory
from .answers import LABEL_THRESHOLD, has_several_labels
from .exit_policies import calibration_mismatch
from .multi_exit import MultiExitConfig, MultiExitForSequenceClassification, label_names

logger = logging.getLogger("fusedacl")
DEFAULT_MAX_LENGTH = 128


def load_tokenizer(
    name_or_path: str, option: str = "model_name_or_path", revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; it pads on the right, so that [CLS] stays first.

    `option`: the command-line option that named it, for messages. `revision`: on the hub.

    Raises:
        ValueError: there is no tokenizer, or it cannot pad.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision or "main")
    except Exception as error:
        # tokenizers raises Exception itself, transformers 4 TypeError, a missing package
        # ImportError.
        raise ValueError(
            f"{option}={name_or_path!r} has no tokenizer that can be loaded: {error}"
        ) from None
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer of {name_or_path!r} has no padding token: choose a BERT-like encoder."
        )
    # Without vocabulary files, transformers makes a tokenizer with special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"{option}={name_or_path!r} has no tokenizer that can be loaded: its "
            "vocabulary is empty. Put tokenizer.json (or vocab.txt) beside config.json."
        )
    tokenizer.padding_side = "right"
    return tokenizer


def length_limit(
    model: MultiExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Return the longest input, in tokens, that both the encoder and the tokenizer allow."""
    limit = int(tokenizer.model_max_length)  # 10^30 where the tokenizer has no limit
    positions = getattr(model.config.backbone_config, "max_position_embeddings", None)
    # Relative positions have no limit, which XLNet writes as -1.
    if positions is not None and positions > 0:
        # RoBERTa and similar encoders number positions from padding_idx + 1.
        table = getattr(getattr(model.backbone, "embeddings", None), "position_embeddings", None)
        reserved = getattr(table, "padding_idx", None)
        limit = min(limit, positions - (0 if reserved is None else reserved + 1))
    return limit


def check_vocabulary(
    model: MultiExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a tokenizer that gives token ids for which the encoder has no embedding.

    Raises:
        ValueError: there are such ids.
    """
    try:
        weight = cast(nn.Embedding, model.backbone.get_input_embeddings()).weight
    except (AttributeError, NotImplementedError):  # CANINE hashes its characters
        return
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= len(weight)}
    if beyond:
        token = min(beyond, key=lambda name: beyond[name])
        raise ValueError(
            f"The encoder has embeddings for {len(weight)} tokens, and its tokenizer has "
            f"{len(beyond)} more, the first being {token!r}: they do not belong together. Take the "
            "encoder's own tokenizer, or enlarge the encoder (resize_token_embeddings) and save it."
        )


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TrainedModel:
    """A trained model, ready for inference, with its tokenizer and sequence length.

    Raises:
        ValueError: `model_name_or_path` is missing or is not a model of fusedacl, or the machine
            cannot run it as asked.
    """

    def __init__(self, options: InferenceOptions, max_length: int | None) -> None:
        path = options.model_name_or_path
        if not path:
            raise ValueError("model_name_or_path is missing: name the output_dir of a run.")
        self.device = choose_device(options.device)
        self.dtype = choose_dtype(self.device, fp16=False, bf16=options.bf16)
        self.model = load_trained(path).eval()
        nn.Module.to(self.model, self.device)
        self.tokenizer = load_tokenizer(path)
        check_vocabulary(self.model, self.tokenizer)
        self.limit = length_limit(self.model, self.tokenizer)
        trained = self.model.config.max_seq_length
        self.max_length = max_length or trained or min(DEFAULT_MAX_LENGTH, self.limit)
        self.record = record_of(self.model)
        if not self.record.is_complete:
            logger.info(
                f"{path} was saved without a record of its data (columns, how labels are written): "
                "they are found in the data anew."
            )

    def encode(self, split: TextSplit, name: str) -> EncodedSplit:
        """Tokenise a split for this model, and log how many of its texts are truncated."""
        encoded = encode(split, self.tokenizer, self.max_length, model_limit=self.limit)
        log_truncation(name, encoded)
        return encoded

    def label_threshold(self, option: float | None) -> float:
        """The probability above which a label applies: that of the option, or the usual one.

        Raises:
            ValueError: the model gives a text one class, for which there is no threshold.
        """
        if option is not None and not has_several_labels(self.model.config):
            raise ValueError(
                f"label_threshold={option:g}: the model gives each text one class, the most "
                "probable one. Leave it out."
            )
        return LABEL_THRESHOLD if option is None else option

    def weights_hash(self) -> str:
        """SHA-256 of the weights, without the learned exit, which `fusedacl exits` adds."""
        state = self.model.state_dict()
        return weights_hash({n: v for n, v in state.items() if not n.startswith("learned_exit.")})

    def calibration_mismatch(self) -> str | None:
        """A warning if this model differs from what its stored policy was calibrated with."""
        record = self.model.config.exit_policy
        promised = (record.get("calibration") or {}).get("guarantee")
        weights = self.weights_hash() if promised else None
        return calibration_mismatch(record, self.dtype, self.max_length, weights)

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return label_names(self.model.config)


def record_of(model: MultiExitForSequenceClassification) -> DataRecord:
    """The record of the data that a model was trained on.

    Raises:
        ValueError: the record in the model's configuration is damaged.
    """
    config = model.config
    several = has_several_labels(config)
    return DataRecord.from_dict(config.data_record, label_names(config), several)


def load_trained(
    path: str, option: str = "model_name_or_path"
) -> MultiExitForSequenceClassification:
    """Load a model that `fusedacl train` saved; `option` named it, for messages.

    Raises:
        ValueError: the directory holds none, or a damaged one.
    """
    where = f"{option}={path!r}"
    model_type = _model_type(path, where)
    if model_type != MultiExitConfig.model_type:
        raise ValueError(
            f"{where} is a {model_type} model, not one that `fusedacl train` has fine-tuned. "
            "Fine-tune it first, with an exit in place of its classifier (if it has one): "
            f"`fusedacl train --model_name_or_path {path} --task_name … --output_dir runs/mine`; "
            f"then {option} is runs/mine."
        )
    problem = model_fault(Path(path))
    if problem is not None:
        raise ValueError(
            f"{where}: {problem}. Copy the directory again, or train again; if the file was "
            f"changed on purpose, delete {MANIFEST_FILE}."
        )
    try:
        # Any, because with output_loading_info transformers returns a pair.
        loaded: Any = MultiExitForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        # safetensors, the hub client and transformers each raise errors of their own here.
        raise ValueError(f"{where} cannot be loaded: {error}{nearest_directory(path)}") from None
    model, report = loaded
    # transformers initialises missing weights at random.
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{where} is damaged: its weights lack {', '.join(missing[:3])}"
            f"{' and more' if len(missing) > 3 else ''}. Copy the directory again, or train again."
        )
    return model


def _model_type(path: str, where: str) -> str | None:
    """Return the model_type in config.json of a directory or of a model on the hub."""
    if not path:
        raise ValueError(f"{where} is empty: name the output_dir of a finished run.")
    config_file = Path(path) / "config.json"
    if Path(path).is_dir() and not config_file.is_file():
        raise ValueError(
            f"{where} holds no config.json: name the output_dir of a finished run, or one of "
            "its checkpoint directories."
        )
    try:
        if config_file.is_file():
            return json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
        return MultiExitConfig.get_config_dict(path)[0].get("model_type")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: config.json is damaged: {error}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be loaded: {error}{nearest_directory(path)}") from None
