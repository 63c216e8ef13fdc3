"""Types of encoders, each trained, served and compared, or refused, as docs/encoders.md says."""

from __future__ import annotations

from pathlib import Path

import pytest
from encoder_zoo import CONFIGS, table_row, try_encoder
from transformers import CONFIG_MAPPING

PAGE = Path(__file__).parents[3] / "docs" / "encoders.md"


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_page_says_what_happens(
    model_type: str, tiny_bert: Path, tiny_data: Path, tmp_path: Path
) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    row = table_row(try_encoder(model_type, tiny_bert, tiny_data, tmp_path))
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), "run `make docs`"


def test_every_row_of_the_page_is_tried() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    assert [row.split("`")[1] for row in rows] == list(CONFIGS)
    assert sum("| refused |" not in row for row in rows) >= 50
