"""The second stage from states on disk: the same training, and caches that do not belong."""

import errno
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fusedacl.engine import MultiExitForSequenceClassification, TrainingConfig
from fusedacl.engine.data.batching import EncodedSplit, collate, encode
from fusedacl.engine.data.columns import TextSplit
from fusedacl.engine.model.early_exit import early_exit
from fusedacl.engine.model.saved import load_tokenizer, load_trained
from fusedacl.engine.runtime.lock import DirectoryLock
from fusedacl.engine.training.builder import build_run
from fusedacl.engine.training.feature_cache import (
    META_FILE,
    STATES_FILE,
    FeatureCache,
    check_directory,
)
from fusedacl.engine.training.trainer import Trainer
from tiny_runs import run

# A model, its encoded texts and the tokenizer.
Parts = tuple[Any, Any, Any]
POSITIONS = [0, 1]
TEXTS = ["the red dog runs", "a bird", "old river near the big house sings", "cat sleeps"]


@pytest.fixture(params=["mha", "linear", "linear mean"])
def parts(request: pytest.FixtureRequest, tiny_bert: Path) -> Parts:
    tokenizer = load_tokenizer(str(tiny_bert))
    head, _, pooling = request.param.partition(" ")
    model = MultiExitForSequenceClassification.from_encoder(
        str(tiny_bert),
        label_names=["no", "yes"],
        exit_layers=[1, 2],
        exit_head=head,
        exit_pooling=pooling or "first",
    ).eval()
    return model, encode(TextSplit(TEXTS, None, [0, 1, 0, 1]), tokenizer, 16), tokenizer


def open_cache(directory: Path, parts: Parts, **changes: Any) -> FeatureCache:
    model, encoded, tokenizer = parts
    options = {"batch_size": 3, "pad_token_id": tokenizer.pad_token_id, **changes}
    return FeatureCache(directory, model, encoded, POSITIONS, **options)


def test_holds_what_the_backbone_computes(parts: Parts, tmp_path: Path) -> None:
    model, encoded, tokenizer = parts
    cache = open_cache(tmp_path / "cache", parts)
    indices = np.array([2, 0])
    states, mask = cache.batch(indices, torch.device("cpu"), torch.float32)
    batch = collate(encoded, indices, tokenizer.pad_token_id)
    batch.pop("labels")
    with torch.no_grad():
        expected = model.exit_states(**batch)
    if model.config.exit_head == "linear":
        read = batch["attention_mask"] / batch["attention_mask"].sum(dim=1, keepdim=True)
        if model.config.exit_pooling == "first":
            read = (
                torch.nn.functional.one_hot(torch.tensor(0), read.shape[1]).float().expand_as(read)
            )
        expected = [(layer * read[..., None]).sum(dim=1, keepdim=True) for layer in expected]
        assert mask.tolist() == [[1], [1]]
    else:
        assert torch.equal(mask, batch["attention_mask"])
    for layer, wanted in zip(states, expected, strict=True):
        # Half precision: 11 bits.
        torch.testing.assert_close(
            layer * mask[..., None], wanted * mask[..., None], rtol=1e-3, atol=1e-3
        )
    assert (tmp_path / "cache" / STATES_FILE).stat().st_size == cache.num_bytes


def test_written_once_and_announced(parts: Parts, tmp_path: Path, caplog, monkeypatch) -> None:
    with caplog.at_level(logging.INFO, logger="fusedacl"):
        open_cache(tmp_path, parts)
        assert "Feature cache: writing 0.00 GB" in caplog.text
        monkeypatch.setattr(type(parts[0]), "exit_states", None)
        open_cache(tmp_path, parts)
    assert caplog.text.count("Feature cache: writing") == 1
    assert caplog.text.count("Feature cache: reading") == 1


def test_one_run_writes_while_others_wait(parts: Parts, tmp_path: Path, caplog) -> None:
    opened: list[FeatureCache] = []
    second = threading.Thread(target=lambda: opened.append(open_cache(tmp_path, parts)))
    with caplog.at_level(logging.INFO, logger="fusedacl"):
        with DirectoryLock(tmp_path).held():
            second.start()
            while "waiting for the run that writes" not in caplog.text:
                second.join(0.02)
                assert second.is_alive()
            assert not (tmp_path / STATES_FILE).exists()
        second.join()
    assert len(opened) == 1 and (tmp_path / META_FILE).is_file()


def test_a_cache_of_other_content_is_refused(parts: Parts, tmp_path: Path) -> None:
    """Before any training, but for other weights, which the first stage trains."""
    model, encoded, tokenizer = parts
    open_cache(tmp_path, parts)

    def check(directory: Path, encoded: EncodedSplit, *positions: int, **changes: Any) -> None:
        dtype = changes.get("dtype", torch.float32)
        check_directory(directory, model, encoded, list(positions or POSITIONS), dtype)

    check(tmp_path, encoded)
    check(tmp_path / "absent", encoded)
    other = encode(TextSplit(TEXTS[::-1], None, [0, 1, 0, 1]), tokenizer, 16)
    with pytest.raises(ValueError, match="holds the states of another run: texts differ"):
        open_cache(tmp_path, (model, other, tokenizer))
    with pytest.raises(ValueError, match="holds the states of another run: texts differ"):
        check(tmp_path, other)
    with pytest.raises(ValueError, match="another run: layers, shape differ. Delete it"):
        check(tmp_path, encoded, 0)
    with pytest.raises(ValueError, match="another run: backbone_dtype differ"):
        check(tmp_path, encoded, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="is a file; name a directory"):
        check(tmp_path / META_FILE, encoded)
    with torch.no_grad():
        next(model.backbone.parameters())[0, 0] += 1
    with pytest.raises(ValueError, match="weights differ. Delete it, or name another"):
        open_cache(tmp_path, parts)


def test_damaged_or_unfinished_caches(parts: Parts, tmp_path: Path) -> None:
    open_cache(tmp_path, parts)
    whole = (tmp_path / STATES_FILE).read_bytes()
    (tmp_path / STATES_FILE).write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="is damaged"):
        open_cache(tmp_path, parts)
    (tmp_path / META_FILE).write_text("{")
    with pytest.raises(ValueError, match="another run"):
        open_cache(tmp_path, parts)
    # A run that was killed while it wrote leaves no meta file.
    (tmp_path / META_FILE).unlink()
    open_cache(tmp_path, parts)
    assert (tmp_path / STATES_FILE).read_bytes() == whole
    assert json.loads((tmp_path / META_FILE).read_text())["layers"] == [1, 2]


def test_states_beyond_half_precision_are_refused(parts: Parts, tmp_path: Path) -> None:
    with torch.no_grad():
        parts[0].backbone.encoder.layer[-1].output.LayerNorm.weight *= 1e6
    with pytest.raises(ValueError, match="beyond float16's 65504"):
        open_cache(tmp_path, parts)
    assert not (tmp_path / META_FILE).exists()


def test_where_no_room_can_be_reserved(parts: Parts, tmp_path: Path, monkeypatch) -> None:
    """A disk that fills up is noticed before writing: later, a signal would end the process.

    Some network file systems, and macOS, have no such call: the cache is made all the same.
    Another error is not taken for that.
    """
    asked = []

    def answer(number: int) -> None:
        def refuse(descriptor: int, *span: int) -> None:
            asked.append(span)
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", refuse)

    for number, kind, message in (
        (errno.ENOSPC, ValueError, r"^feature_cache=.* No space left.*larger disk, or"),
        (errno.EIO, OSError, "Input/output error"),
    ):
        answer(number)
        with pytest.raises(kind, match=message):
            open_cache(tmp_path / "broken", parts)
        assert not any((tmp_path / "broken" / name).exists() for name in (STATES_FILE, META_FILE))
    answer(errno.EOPNOTSUPP)
    network = open_cache(tmp_path / "network", parts)
    assert asked == [(0, network.num_bytes)] * 3
    monkeypatch.delattr(os, "posix_fallocate")
    elsewhere = open_cache(tmp_path / "macos", parts)
    assert np.array_equal(network.states, elsewhere.states)
    assert (tmp_path / "macos" / STATES_FILE).stat().st_size == elsewhere.num_bytes


def test_a_disk_without_room_is_noticed_before_writing(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed run left takes no room: it is deleted first."""
    left = tmp_path / STATES_FILE
    left.write_bytes(b"0" * 10_000)
    free = {True: 0, False: 10}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=free[left.exists()])
    )
    with pytest.raises(ValueError, match="GB are needed and 0.00 GB are free"):
        open_cache(tmp_path, parts)
    assert not left.exists()
    left.write_bytes(b"0" * 10_000)
    free[False] = 10**9
    open_cache(tmp_path, parts)


def test_what_cannot_be_written_is_refused_before_training(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoded, _ = parts
    directory, closed = tmp_path / "deep" / "cache", [tmp_path]

    def check(**changes: Any) -> None:
        check_directory(directory, model, encoded, POSITIONS, torch.float32, **changes)

    monkeypatch.setattr(os, "access", lambda path, mode: path not in closed)
    with pytest.raises(ValueError, match="^feature_cache=.* no files can be created in.*leave fea"):
        check()
    closed.clear()
    # What a killed run left, or another run is writing, takes room that the new states may have.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match="GB are needed and 0.00 GB are free. Name a directory"):
        check()
    assert not (tmp_path / "deep").exists()
    directory.mkdir(parents=True)
    (directory / STATES_FILE).write_bytes(b"0" * 10_000)
    check()
    monkeypatch.undo()
    open_cache(directory, parts)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check()
    # The first stage of the run will have other weights.
    with pytest.raises(ValueError, match="^feature_cache=.* no files can be created"):
        check(replaces_weights=True)
    directory = tmp_path / "deep" / "cache" / META_FILE / "below"
    with pytest.raises(ValueError, match=f"{META_FILE}' is a file; name a directory"):
        check()


def test_other_weights_are_replaced_and_nothing_else(parts: Parts, tmp_path: Path, caplog) -> None:
    model, _, tokenizer = parts
    before = np.array(open_cache(tmp_path, parts).states)
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(2)
    with pytest.raises(ValueError, match="weights differ. Delete it"):
        open_cache(tmp_path, parts)
    with caplog.at_level(logging.INFO, logger="fusedacl"):
        after = open_cache(tmp_path, parts, replaces_weights=True)
    assert "replacing the states of other weights" in caplog.text
    assert not np.array_equal(after.states, before)
    assert np.array_equal(open_cache(tmp_path, parts).states, after.states)
    other = encode(TextSplit(TEXTS[::-1], None, [0, 1, 0, 1]), tokenizer, 16)
    with pytest.raises(ValueError, match="texts, weights differ|texts differ"):
        open_cache(tmp_path, (model, other, tokenizer), replaces_weights=True)


def test_killed_while_weights_are_replaced(parts: Parts, tmp_path: Path, monkeypatch) -> None:
    """The old description never stands beside new states."""
    open_cache(tmp_path, parts)
    with torch.no_grad():
        next(parts[0].backbone.parameters()).mul_(2)

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(FeatureCache, "_make", die)
        with pytest.raises(KeyboardInterrupt):
            open_cache(tmp_path, parts, replaces_weights=True)
    assert not (tmp_path / META_FILE).exists()
    open_cache(tmp_path, parts)


@pytest.mark.parametrize("kind", [{}, {"exit_head": "linear", "exit_pooling": "mean"}])
def test_second_stage_with_and_without(
    kind: dict[str, str], tiny_options, tmp_path: Path, monkeypatch
) -> None:
    """Gradients agree to half precision from equal weights; a whole run reads the cache only."""
    options: dict[str, Any] = {
        **tiny_options, "per_device_train_batch_size": 16, "learning_rate": 5e-3,
        "strategy": "two_stage", "dropout": 0.0, "num_train_epochs": 1, "stage2_epochs": 3,
        "save_steps": 0, "eval_steps": 1000, **kind,
    }  # fmt: skip
    cache = {"feature_cache": str(tmp_path / "cache")}
    found = []
    for name, changes in (("without", {}), ("with", cache)):
        config = TrainingConfig.create(**{**options, **changes, "output_dir": str(tmp_path / name)})
        trainer = Trainer(build_run(config))
        trainer._start_stage(1)
        (losses,) = trainer.losses.of(1, 1, [np.arange(16)])
        trainer.backend.backward(losses)
        gate = trainer.backend.gate
        gradients = [[p.grad for p in trainer.backend.parameters], gate._auxiliary]
        # The contrastive loss does not reach the bias of a linear classifier.
        found.append(
            [torch.cat([g.flatten() for g in grads if g is not None]) for grads in gradients]
        )
        trainer.parts.lock.release()
    for ours, theirs in zip(*found, strict=True):
        # States of 11 bits, whose errors a gradient adds up.
        assert (ours - theirs).abs().max() < 0.01 * theirs.abs().max()
        assert not torch.equal(ours, theirs)

    calls = []
    states = FeatureCache.batch
    monkeypatch.setattr(
        FeatureCache, "batch", lambda *arguments: calls.append(1) or states(*arguments)
    )
    # The first stage has changed the backbone.
    run(options, output_dir=str(tmp_path / "run"), feature_cache=str(tmp_path / "trained"))
    assert len(calls) == 12
    model = load_trained(str(tmp_path / "run"))
    assert model.exits[0].pooling == "mean" if kind else model.config.exit_pooling == "first"
    ids = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    early = early_exit(model, batch, "fixed_layer", layer=1)
    with torch.no_grad():
        logits = model(**batch).exit_logits[0]
    torch.testing.assert_close(early.probabilities, logits.softmax(dim=-1))


def test_another_cache_on_resuming(tiny_options, tmp_path: Path) -> None:
    """A run replaces the states of another run's first stage, and may take another cache."""
    options: dict[str, Any] = {
        **tiny_options, "per_device_train_batch_size": 16, "strategy": "two_stage",
        "num_train_epochs": 1, "feature_cache": str(tmp_path / "cache"),
    }  # fmt: skip
    run(options, output_dir=str(tmp_path / "first"))
    first = (tmp_path / "cache" / STATES_FILE).read_bytes()
    run(options, seed=7)
    assert (tmp_path / "cache" / STATES_FILE).read_bytes() != first
    # A given first stage may have another run's cache only by mistake.
    given = {"model_name_or_path": None, "stage1_model": str(tmp_path / "first")}
    with pytest.raises(ValueError, match="weights differ. Delete it, or name another directory"):
        run(options, output_dir=str(tmp_path / "given"), **given)
    options |= {"seed": 7, "resume_from_checkpoint": "latest"}
    run(options, feature_cache=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="learning_rate: .* then, 0.5 now"):
        run(options, feature_cache=None, learning_rate=0.5)
