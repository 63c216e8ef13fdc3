"""The exit heads against their definition, term by term."""

from __future__ import annotations

import pytest
import torch
from fusedacl.engine.model.exits import LinearExit, MHAExit
from torch.nn import functional


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [3, 6, 16] and a mask with padding on the right."""
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[0, 3:] = 0
    mask[1, 5:] = 0
    return torch.randn(3, 6, 16), mask


def test_mha_exit_equals_full_attention_read_at_the_first_token(states) -> None:
    hidden, mask = states
    head = MHAExit(16, num_labels=5, dropout=0.1, width=8, num_heads=2).eval()
    output = head(hidden, mask)
    tokens = torch.tanh(hidden @ head.down_projection.weight.T + head.down_projection.bias)
    query = tokens @ head.query.weight.T + head.query.bias
    key, value = (tokens @ head.key_value.weight.T + head.key_value.bias).split(8, dim=-1)
    parts = []
    for columns in (slice(0, 4), slice(4, 8)):
        scores = query[..., columns] @ key[..., columns].transpose(1, 2) / 4**0.5
        scores = scores.masked_fill(mask[:, None, :] == 0, float("-inf"))
        parts.append(scores.softmax(dim=-1) @ value[..., columns])
    attended = torch.cat(parts, dim=-1) @ head.output.weight.T + head.output.bias
    expected = torch.tanh(attended[:, 0])
    torch.testing.assert_close(output.embeddings, expected)
    torch.testing.assert_close(output.logits, expected @ head.classifier.weight.T)
    assert head.classifier.bias is None


def test_mha_exit_ignores_padding(states) -> None:
    hidden, mask = states
    head = MHAExit(16, num_labels=5, dropout=0.0, width=8, num_heads=2)
    expected = head(hidden, mask).logits
    hidden = hidden.masked_fill(mask[..., None] == 0, 100.0)
    torch.testing.assert_close(head(hidden, mask).logits, expected)


def test_linear_exit_reads_the_first_token(states) -> None:
    hidden, mask = states
    head = LinearExit(16, num_labels=5, dropout=0.5).eval()
    output = head(hidden, mask)
    assert torch.equal(output.embeddings, hidden[:, 0])
    expected = functional.linear(hidden[:, 0], head.classifier.weight, head.classifier.bias)
    torch.testing.assert_close(output.logits, expected)


def test_linear_exit_reads_the_mean_of_the_tokens(states) -> None:
    hidden, mask = states
    head = LinearExit(16, num_labels=5, dropout=0.5, pooling="mean").eval()
    expected = torch.stack(
        [text[real.bool()].mean(dim=0) for text, real in zip(hidden, mask, strict=True)]
    )
    # Nothing of what stands in padding, not even a value that is no number.
    hidden = hidden.masked_fill(mask[..., None] == 0, torch.nan)
    output = head(hidden, mask)
    torch.testing.assert_close(output.embeddings, expected)
    torch.testing.assert_close(output.logits, head.classifier(expected))
    large = torch.full((1, 512, 16), 1000.0, dtype=torch.float16)
    assert head.text_states(large, torch.ones(1, 512)).eq(1000).all()


@pytest.mark.parametrize("head", [LinearExit(16, 5, 0.5), MHAExit(16, 5, 0.5, 8, 2)])
def test_dropout_acts_in_training_only(head, states) -> None:
    hidden, mask = states
    head.train()
    assert not torch.equal(head(hidden, mask).logits, head(hidden, mask).logits)
    head.eval()
    assert torch.equal(head(hidden, mask).logits, head(hidden, mask).logits)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="exit_width=9 is not a multiple of exit_attention_heads"):
        MHAExit(16, 5, 0.1, width=9, num_heads=2)
