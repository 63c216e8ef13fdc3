"""README.md and docs/ are true: their code runs, their options, files, links and numbers exist.

The language of a code block says what is done with it:

    python   is executed, the blocks of a page one after another in one namespace
    py       a script for several processes, which tests/distributed/loops/test_examples.py runs
    sh       commands of fusedacl, executed in a folder with a tiny encoder and tiny data
    console  commands that need a network, a GPU, a launcher or minutes: their options are checked
    yaml     a recipe or the options of a run, which are checked; written to the file that its first
             line names
    text     output, drawings and formulas
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shlex
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import fusedacl.engine
import fusedacl.kernels
import pytest
import yaml
from fusedacl.benchmarks.cli import main as run_benchmark
from fusedacl.engine import TrainingConfig
from fusedacl.engine.cli.main import main
from fusedacl.engine.experiments.recipe import plan_cells
from fusedacl.engine.experiments.report_plan import plan_report
from fusedacl.engine.experiments.results import SweepRun, read_sweep

ROOT = Path(__file__).parents[1]
GENERATED = (
    "docs/performance.md", "docs/results.md", "docs/kernel_resources.md",
    "docs/scaling_by_the_model.md",
)  # fmt: skip
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [page for page in PAGES if str(page.relative_to(ROOT)) not in GENERATED]
LANGUAGES = {"python", "py", "sh", "console", "yaml", "text"}
VERBS = (
    *("train", "try", "evaluate", "predict", "exits", "export", "sweep", "angles", "tsne"),
    "report",
)
SUITES = (
    *("loss", "angle", "growth", "step", "loops", "exits", "scaling", "all", "compare", "report"),
)
# Options of programs that are not ours, in the commands of the pages.
LAUNCHERS = {
    "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port", "--hostfile",
    "--no_ssh", "--num_gpus", "--module", "--no-deps", "--no-build-isolation",
}  # fmt: skip
MAX_README_LINES = 130


class Block(NamedTuple):
    line: int
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for found in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def text_of(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(code: str) -> list[list[str]]:
    """The words of each command of a shell block, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.replace("…", ""), comments=True))]


def id_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def options(command: str) -> dict[str, str | None]:
    """Option -> printed default, of `fusedacl <command>`, as its --help lists them."""
    words = [*command.split(), "--help"]
    run, words = (run_benchmark, words[1:]) if words[0] == "bench" else (main, words)
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        contextlib.suppress(SystemExit),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("COLUMNS", "2000")  # no line breaks within an option's text
        run(words)
    found: dict[str, str | None] = {}
    for text in re.split(r"\n(?=  --)", output.getvalue())[1:]:
        default = re.search(r"\(default: (.*?)\)\s*(\n\n|$)", text, re.DOTALL)
        found[text.split()[0]] = default and default[1]
    assert found, f"fusedacl {command} --help lists no option"
    return found


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_data: Path) -> Path:
    """The encoder and the files with texts that the examples name."""
    directory = tmp_path_factory.mktemp("documents")
    shutil.copytree(tiny_bert, directory / "bert-base-uncased")
    for name, split in (("train", "train"), ("dev", "validation"), ("texts", "validation")):
        lines = (tiny_data / "opinions" / f"{split}.jsonl").read_text().splitlines()
        with (directory / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["sentence", "label"])
            writer.writeheader()
            writer.writerows(map(json.loads, lines))
    return directory


@pytest.mark.parametrize(
    "page",
    [page for page in WRITTEN if {block.language for block in blocks(page)} & {"sh", "python"}],
    ids=id_of,
)
def test_blocks_run(
    page: Path, sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sandbox, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{id_of(page)}:{block.line}"
        if block.language == "yaml":
            (tmp_path / block.code.split("\n")[0].strip("# ")).write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, where, "exec"), namespace)
        elif block.language == "sh":
            for program, *arguments in commands(block.code):
                assert program == "fusedacl", f"{where}: mark {program} as console"
                assert main(arguments) == 0, f"{where}: fusedacl {' '.join(arguments)}"


@pytest.mark.parametrize("page", WRITTEN, ids=id_of)
def test_blocks_have_a_language_and_known_options(page: Path) -> None:
    for block in blocks(page):
        where = f"{id_of(page)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: one of {LANGUAGES}"
        if block.language in ("sh", "console"):
            for words in commands(block.code):
                check_command(words, where)
        elif block.language == "yaml":
            check_yaml(block.code, where)


def check_command(words: list[str], where: str) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(word for word in words[1:] if "=" not in word) <= set(targets), where
        return
    used = {word.split("=")[0] for word in words if word.startswith("--")}
    known = set(LAUNCHERS)
    own = [place for place, word in enumerate(words) if word in ("fusedacl", "fusedacl.engine")]
    if own:
        verb, *rest = words[own[0] + 1 :] or ["train"]
        assert verb in (*VERBS, "bench", "doctor"), where
        if verb == "doctor":
            assert not used, where
        else:
            known |= options(f"bench {rest[0]}" if verb == "bench" else verb).keys()
            known |= options("train").keys() if verb in ("sweep", "try") else set()
    elif "-m" in words:
        source = ROOT.joinpath(*words[words.index("-m") + 1].split(".")[1:])
        source = source / "__main__.py" if source.is_dir() else source.with_suffix(".py")
        known.update(re.findall(r"--[a-z]\w*", source.read_text()))
    assert used <= known, f"{where}: {words[0]} has no {used - known}"


def check_yaml(code: str, where: str) -> None:
    assert re.match(r"# \S+\.yaml\n", code), f"{where}: no file name"
    values = yaml.safe_load(code)
    if "methods" in values:
        assert plan_cells(values)
        plan_report(values)
    else:
        TrainingConfig.create(**values).resolved()


def tables(page: Path) -> list[list[list[str]]]:
    """The cells of each table, its header first."""
    found = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    split = [
        [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table.splitlines()]
        for table in found
    ]
    return [[rows[0], *rows[2:]] for rows in split]


def documented() -> dict[str, dict[str, tuple[str, str]]]:
    """Verb -> option -> (page, printed default), from the tables of options."""
    found: dict[str, dict[str, tuple[str, str]]] = {verb: {} for verb in VERBS}
    for page in WRITTEN:
        for header, *rows in tables(page):
            for verb in re.findall(r"^option of `fusedacl (\w+)`", header[0]):
                for row in rows:
                    default = row[header.index("default")]
                    names = re.findall(r"`(--\w+)`", row[0])
                    found[verb] |= dict.fromkeys(names, (id_of(page), default))
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_tables_of_options(verb: str) -> None:
    """Every option of a verb is in a table, with its default, and no other option is."""
    listed, known = documented()[verb], options(verb)
    if verb in ("exits", "export"):  # their data options are those of evaluate
        shared = documented()["evaluate"].items()
        on_data_page = {name for name, (page, _) in shared if page == "docs/data.md"}
        known = {name: value for name, value in known.items() if name not in on_data_page}
    assert listed.keys() == known.keys()
    for name, (page, default) in listed.items():
        printed = known[name]
        if printed is None or " " in printed:
            continue  # words, not a value
        assert default.removesuffix(" (required)") == printed, f"{page}: default of {name}"


@pytest.mark.parametrize("page", WRITTEN, ids=id_of)
def test_options_and_files_in_the_text_exist(page: Path) -> None:
    known = set(LAUNCHERS)
    for command in (*VERBS, *(f"bench {suite}" for suite in SUITES)):
        known |= options(command).keys()
    for source in ("kernels", "benchmarks"):
        for path in (ROOT / source).rglob("*.py"):
            known.update(re.findall(r'"(--[a-z]\w*)"', path.read_text()))
    for span in re.findall(r"`[^`\n]*`", text_of(page)):
        for name in re.findall(r"(?<!\S)--[a-z]\w*", span.strip("`")):
            assert name in known, f"{id_of(page)}: {name}"
    # Paths of this repository, such as `kernels/contrastive/reference.py`.
    named = r"`((?:kernels|engine|benchmarks|tests|docs)/[\w./]*)`"
    for name in re.findall(named, text_of(page)):
        assert (ROOT / name).exists(), f"{id_of(page)}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{id_of(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{id_of(page)}: {target}"


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= MAX_README_LINES
    found, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        found.add(page)
        linked = re.findall(r"\]\(([^)\s#:]+\.md)", page.read_text(encoding="utf-8"))
        left += {(page.parent / name).resolve() for name in linked} - found
    assert set((ROOT / "docs").glob("*.md")) <= found


def test_every_public_name_is_documented() -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    for name in (*fusedacl.kernels.__all__, *fusedacl.engine.__all__):
        assert re.search(rf"\b{name}\b", text), name


def test_the_numbers_of_the_readme() -> None:
    """The table of CE beside ACL is that of the committed result files."""
    shown = tables(ROOT / "README.md")
    (rows,) = [rows for header, *rows in shown if header[-1] == "memory of a step"]
    step = json.loads((ROOT / "benchmarks/results/amd-epyc-2core/step.json").read_text())
    providers = step["cases"][0]["providers"]
    few, every = (
        read_sweep(ROOT / "docs/results" / name) for name in ("minilm_fewshot", "minilm_trained")
    )
    # The names of an objective in a few texts of each class, in all of them, and in the benchmark.
    names = {
        "CE": ("CE", "CE", "ce"),
        "CE+SCL": ("CE+SCL", "CE+SCL", "scl"),
        "ACL": ("ACL", "ACL backbone", "acl"),
    }
    assert [row[0] for row in rows] == list(names)
    for label, *cells, milliseconds, mebibytes in rows:
        expected = []
        for sweep, method in zip((few, every), names[label][:2], strict=True):
            for task in sweep.tasks:
                score = partial(SweepRun.score, metric=str(sweep.metric(task)))
                expected.append(sweep.seeds(task, method, (), score).words or "-")
        assert cells == expected, label
        measured = providers[f"fusedacl_{names[label][-1]}"]
        assert milliseconds == f"{measured['p50_ms']:,.0f} ms"
        assert mebibytes == f"{measured['peak_bytes'] / 2**20:.0f} MiB"
    base = providers["fusedacl_ce"]["p50_ms"]
    times, top2 = (
        f"{providers[name]['p50_ms'] / base:.2f} times"
        for name in ("fusedacl_acl", "fusedacl_acl_top2")
    )
    text = (ROOT / "README.md").read_text()
    assert f"{times} the time of CE, {top2} with `--gate_scope top:2`" in text
    assert f"A step takes {times} as long" in (ROOT / "docs/results.md").read_text()


def test_the_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0"
    assert f'version="{citation["version"]}"' in (ROOT / "setup.py").read_text()
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2602.03563"
