"""The pages in a real browser: the script runs, and the page fits small and large windows."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from fusedacl.engine.config.commands import TSNEConfig
from fusedacl.engine.config.fields import build
from fusedacl.engine.reports.analyses.angle_report import write_angles
from fusedacl.engine.reports.analyses.gradient_angles import AngleRecords
from fusedacl.engine.reports.analyses.representation_report import write_representations
from fusedacl.engine.reports.analyses.representations import Representations
from fusedacl.engine.reports.sweep_report import write_report

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--virtual-time-budget=2000",
)  # fmt: skip
# Sorts the table of a section by a column of numbers and by its names, points at a legend entry of
# its chart (those of t-SNE have no effect), and records the results.
_PROBE = """<script>
const root = document.documentElement, note = root.dataset;
note.scrollWidth = root.scrollWidth; note.clientWidth = root.clientWidth;
const section = document.querySelector("#SECTION"), table = section.querySelector("table");
const column = (n) => [...table.tBodies[0].rows].map((row) => row.cells[n].textContent).join("|");
note.before = column(COLUMN);
table.tHead.rows[0].cells[COLUMN].firstChild.click(); note.down = column(COLUMN);
table.tHead.rows[0].cells[COLUMN].firstChild.click(); note.up = column(COLUMN);
table.tHead.rows[0].cells[0].firstChild.click(); note.names = column(0);
const chart = section.querySelector("svg");
const entry = chart.querySelector('[data-legend="1"]');
const dimmed = () => [...chart.querySelectorAll(".dimmed")].map((g) => g.dataset.series).join("|");
entry?.dispatchEvent(new Event("pointerenter")); note.dimmed = dimmed();
entry?.dispatchEvent(new Event("pointerleave")); note.shown = dimmed();
if (parent !== window) parent.postMessage({...note}, "*");
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on PATH")
    return found


@dataclass(frozen=True)
class ProbedPage:
    """A page with the probe in it, and the results that the probe must record.

    names: first column of the section's table, sorted; dimmed: series that are not pointed at.
    """

    path: Path
    section: str
    column: int
    names: tuple[str, ...]
    dimmed: frozenset[str]

    def __post_init__(self) -> None:
        probe = _PROBE.replace("SECTION", self.section).replace("COLUMN", str(self.column))
        self.path.write_text(self.path.read_text().replace("</body>", f"{probe}</body>"))


@pytest.fixture(scope="module", params=["sweep", "angles", "tsne"])
def probed_page(
    request: pytest.FixtureRequest, unfinished_sweep: Path, tmp_path_factory: pytest.TempPathFactory
) -> ProbedPage:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "angles":
        return angle_page(directory)
    if request.param == "tsne":
        return tsne_page(directory)
    page = write_report([unfinished_sweep], directory).page
    names = ("2ST-linear", "2ST-MHA", "ACL", "JT")
    # A line and its band of each of the three other methods.
    return ProbedPage(page, "layer-scores-mrpc", 8, names, frozenset("023"))


def angle_page(directory: Path) -> ProbedPage:
    random = np.random.default_rng(0)
    groups = ("embeddings", "layer 1", "layer 2", "exit 2")
    records = []
    for label in ("CE", "ACL"):
        stats = random.uniform(1, 2, (12, len(groups), 3))
        stats[..., 0] = random.uniform(-1, 1, stats.shape[:2])
        records.append(AngleRecords(label, "rte", "ACL", "batches of 16", groups, stats, 0))
    page = write_angles(records, directory)[1][-1]
    rows = len(records[0].names)
    return ProbedPage(page, "gradient-angles", 3, ("ACL",) * rows + ("CE",) * rows, frozenset("0"))


def tsne_page(directory: Path) -> ProbedPage:
    random = np.random.default_rng(0)
    classes, centres = np.repeat(range(3), 8), np.eye(3, 6)
    found = [
        Representations(
            label, "rte, validation", layer, centres[classes] + random.normal(0, 0.3, (24, 6)),
            centres, classes, ["no", "perhaps", "yes"],
        )
        for label in ("CE", "ACL")
        for layer in (1, 2)
    ]  # fmt: skip
    options = build(TSNEConfig, {"output_dir": str(directory), "perplexity": 5})
    page = write_representations(found, options)[1][-1]
    return ProbedPage(page, "representations", 5, ("ACL", "ACL", "CE", "CE"), frozenset())


def run(browser: str, *arguments: str, profile: Path) -> str:
    command = [browser, *_FLAGS, f"--user-data-dir={profile}", *arguments]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_the_script_runs(browser: str, probed_page: ProbedPage, tmp_path: Path) -> None:
    html = run(browser, "--dump-dom", probed_page.path.as_uri(), profile=tmp_path / "profile")
    root = html[html.index("<html") : html.index("<head")]
    notes = dict(re.findall(r'data-([\w-]+)="([^"]*)"', root))
    assert notes["ready"] == "true" and "error" not in notes
    scores = sorted(notes["before"].split("|"), key=lambda words: float(words.split()[0]))
    assert notes["up"].split("|") == scores
    assert notes["down"].split("|") == scores[::-1]
    assert tuple(notes["names"].split("|")) == probed_page.names
    assert set(filter(None, notes["dimmed"].split("|"))) == probed_page.dimmed
    assert notes["shown"] == ""


@pytest.mark.parametrize("width", [1400, 360])
def test_it_fits_windows(browser: str, probed_page: ProbedPage, tmp_path: Path, width: int) -> None:
    page, picture = probed_page.path, tmp_path / "page.png"
    if width < 500:
        # A window is at least 500 pixels wide; a frame can be narrower.
        page = tmp_path / "frame.html"
        page.write_text(
            '<!DOCTYPE html><body style="margin:0"><script>onmessage = (event) => {'
            "Object.assign(document.documentElement.dataset, event.data); };</script>"
            f'<iframe src="{probed_page.path.as_uri()}" '
            f'style="width:{width}px;height:1600px;border:0">'
        )
    arguments = [f"--window-size={max(width, 500)},1600", page.as_uri()]
    run(browser, f"--screenshot={picture}", *arguments, profile=tmp_path / "profile")
    pixels = matplotlib.image.imread(picture)[:, :width, :3]
    assert pixels.shape[0] == 1600
    for part in np.array_split(pixels, 4):
        assert part.std() > 0.02, "a part of the page is blank"
    html = run(browser, "--dump-dom", *arguments, profile=tmp_path / "other")
    # Widths of the document and of its window.
    found = dict(re.findall(r'data-(scroll|client)-width="(\d+)"', html))
    assert found == {"scroll": str(width), "client": str(width)}
