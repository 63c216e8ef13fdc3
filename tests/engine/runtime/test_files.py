"""Places that are checked before the work whose results they get."""

from __future__ import annotations

from pathlib import Path

import pytest
from fusedacl.engine.runtime.files import check_writable


def test_places_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file.csv").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "made" / "later")
    for name in (".", "new", "new/below", "file.csv", "link"):
        check_writable(tmp_path / name, "output_file")
    for name in (".", "new", "new/below", "link"):
        check_writable(tmp_path / name, "output_dir", directory=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.csv", "link"]


def test_places_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "closed" / "out.csv")
    with pytest.raises(ValueError, match="output_dir='.*file' is a file: name a directory"):
        check_writable(tmp_path / "file", "output_dir", directory=True)
    with pytest.raises(ValueError, match="option='.*below' cannot be.*file' is a file, no directo"):
        check_writable(tmp_path / "file" / "below", "option")
    # As of a user who is not root, whom every directory permits everything.
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path / "closed")
    for name in ("closed", "closed/new/below", "link"):
        with pytest.raises(ValueError, match="closed' does not permit it. Change its permissions"):
            check_writable(tmp_path / name, "output_dir")
