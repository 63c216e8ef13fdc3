"""The page in a real browser: its script runs, and it fits a telephone and a large window."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from fusedacl.engine.analysis.sweep_report import write_report

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--virtual-time-budget=2000",
)  # fmt: skip
# Sorts the last table by its second column, points at a legend entry, and notes what came of it.
_PROBE = """<script>
const root = document.documentElement, note = root.dataset;
note.scrollWidth = root.scrollWidth; note.clientWidth = root.clientWidth;
const table = document.querySelector("#layer-scores-mrpc table");
const column = () => [...table.tBodies[0].rows].map((row) => row.cells[8].textContent).join("|");
note.before = column();
table.tHead.rows[0].cells[8].firstChild.click(); note.down = column();
table.tHead.rows[0].cells[8].firstChild.click(); note.up = column();
table.tHead.rows[0].cells[0].firstChild.click();
note.names = [...table.tBodies[0].rows].map((row) => row.cells[0].textContent).join("|");
const chart = document.querySelector("#layer-scores-mrpc svg");
const entry = chart.querySelector('[data-legend="1"]');
const dimmed = () => [...chart.querySelectorAll(".dimmed")].map((g) => g.dataset.series).join("|");
entry.dispatchEvent(new Event("pointerenter")); note.dimmed = dimmed();
entry.dispatchEvent(new Event("pointerleave")); note.shown = dimmed();
if (parent !== window) parent.postMessage({...note}, "*");
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on PATH")
    return found


@pytest.fixture(scope="module")
def probed_page(unfinished_sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("page")
    page = write_report([unfinished_sweep], directory).page
    page.write_text(page.read_text().replace("</body>", f"{_PROBE}</body>"))
    return page


def run(browser: str, *arguments: str, profile: Path) -> str:
    made = subprocess.run(
        [browser, *_FLAGS, f"--user-data-dir={profile}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_the_script_runs(browser: str, probed_page: Path, tmp_path: Path) -> None:
    html = run(browser, "--dump-dom", probed_page.as_uri(), profile=tmp_path / "profile")
    root = html[html.index("<html") : html.index("<head")]
    notes = dict(re.findall(r'data-([\w-]+)="([^"]*)"', root))
    assert notes["ready"] == "true"
    assert "error" not in notes
    scores = sorted(notes["before"].split("|"), key=lambda words: float(words.split()[0]))
    assert notes["up"].split("|") == scores
    assert notes["down"].split("|") == scores[::-1]
    assert notes["names"].split("|") == ["2ST-linear", "2ST-MHA", "ACL", "JT"]
    # A line and its band of each of the three other methods.
    assert notes["dimmed"].split("|") and set(notes["dimmed"].split("|")) == {"0", "2", "3"}
    assert notes["shown"] == ""


def test_it_fits_a_large_window(browser: str, probed_page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "wide.png"
    arguments = ["--window-size=1400,1600", f"--screenshot={picture}", probed_page.as_uri()]
    run(browser, *arguments, profile=tmp_path / "profile")
    check_not_blank(picture, 1400)
    html = run(
        browser, "--window-size=1400,1600", "--dump-dom", probed_page.as_uri(),
        profile=tmp_path / "other",
    )  # fmt: skip
    assert widths(html) == (1400, 1400)


def test_it_fits_a_telephone(browser: str, probed_page: Path, tmp_path: Path) -> None:
    # A window is at least 500 wide; a frame has no such limit.
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<!DOCTYPE html><body style="margin:0"><script>onmessage = (event) => {'
        "Object.assign(document.documentElement.dataset, event.data); };</script>"
        f'<iframe src="{probed_page.as_uri()}" style="width:360px;height:1600px;border:0">'
    )
    picture = tmp_path / "narrow.png"
    arguments = ["--window-size=500,1600", f"--screenshot={picture}", frame.as_uri()]
    run(browser, *arguments, profile=tmp_path / "profile")
    check_not_blank(picture, 360)
    html = run(browser, "--dump-dom", frame.as_uri(), profile=tmp_path / "other")
    assert widths(html) == (360, 360)


def widths(html: str) -> tuple[int, int]:
    """Of the document and of its window."""
    found = dict(re.findall(r'data-(scroll|client)-width="(\d+)"', html))
    return int(found["scroll"]), int(found["client"])


def check_not_blank(picture: Path, width: int) -> None:
    pixels = matplotlib.image.imread(picture)[:, :width, :3]
    assert pixels.shape[0] == 1600
    for part in np.array_split(pixels, 4):
        assert part.std() > 0.02
