"""Messages to processes that differ; the other process is simulated."""

from pathlib import Path
from typing import Any

import pytest
from fusedacl.engine.runtime import collectives, processes


def test_the_first_difference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    collectives.check_alike({"rows of train": 5})
    for other, message in (
        ({"seed": 1, "rows of train": 6}, "rows of train: process 0 on a has 5, process 1 on b "),
        ({"seed": 1}, "process 1 on b has None. All processes of a run need the same. Copy it.$"),
        ({"seed": 1, "rows of train": 5, "test": 2}, "test: process 0 on a has None, process 1"),
    ):
        answers = [("a", {"seed": 1, "rows of train": 5}), ("b", other)]
        monkeypatch.setattr(collectives, "gathered", lambda value, found=answers: found)
        with pytest.raises(ValueError, match=message):
            collectives.check_alike({}, "Copy it.")


def test_a_directory_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As process 1 sees it: it is there, but has not what process 0 has written."""
    (tmp_path / "config.yaml").touch()
    told: dict[str, Any] = {"token": tmp_path / ".shared-1"}
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    monkeypatch.setattr(collectives, "from_first", lambda make: told["token"])
    monkeypatch.setattr(collectives, "together", lambda action: action())
    with pytest.raises(ValueError, match="output_dir=.* is not the directory that process 0"):
        collectives.check_shared(tmp_path)
    told["token"].touch()
    collectives.check_shared(tmp_path)
    # As process 0 does it.
    monkeypatch.setattr(processes, "rank", lambda: 0)
    monkeypatch.setattr(collectives, "from_first", lambda make: make())
    told["token"].unlink()
    collectives.check_shared(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
