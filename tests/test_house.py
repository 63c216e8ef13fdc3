"""The layout of the packages and the tests: order of imports, sizes of folders and files.

Nothing but the standard library and pytest is imported: `make lint` runs this file as well.
"""

from __future__ import annotations

import ast
import graphlib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "engine", "benchmarks")

# Folder -> its entries in layers, lowest first; an entry imports entries of lower layers only.
FLOORS = {
    "": ("kernels", "engine", "benchmarks"),
    "kernels": ("support", "gradients contrastive", "tuning targets"),
    "kernels.contrastive": (
        "batch",
        "autograd",
        "reference tiled",
        "gpu",
        "wider",
        "dispatch sharded options",
        "checks",
        "losses",
        "modules",
    ),
    "engine": (
        "runtime",
        "config",
        "data",
        "model",
        "objectives inference",
        "backends",
        "training",
        "integrations",
        "experiments",
        "reports",
        "cli",
        "__main__",
    ),
    "benchmarks": (
        "measuring",
        "floors comparing",
        "suites",
        "counts options gpu",
        "pages",
        "cli",
        "__main__",
    ),
}
MAX_ENTRIES = 14
MAX_LINES = 450
MAX_LINES_OF_TRITON = 520
NO_CODE = {"__pycache__", "results", "py.typed"}


def source_files(*suffixes: str) -> list[Path]:
    """Files of the packages and of the tests."""
    files = [path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in files if path.suffix in suffixes)


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of this project that it imports, also in functions and for types only.

    An import that is not relative keeps its dot at the front, so that it matches no module.
    """
    found: dict[str, set[str]] = {}
    files = {}
    for path in source_files(".py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "tests":
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for module, path in files.items():
        folder = path.relative_to(ROOT).parent.parts
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[module] |= {f".{alias.name}" for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found[module].add(f".{node.module}")
            elif isinstance(node, ast.ImportFrom):
                start = folder[: len(folder) - node.level + 1]
                source = ".".join([*start, *(node.module or "").split(".")]).strip(".")
                names = [f"{source}.{alias.name}".strip(".") for alias in node.names]
                found[module] |= {name if name in files else source for name in names}
        found[module].discard(module)
    return found


def entry_of(module: str, folder: str) -> str | None:
    """Entry of `folder` that holds a module; None where it lies elsewhere."""
    inside = module if not folder else module.removeprefix(folder + ".")
    return inside.split(".")[0] if not folder or inside != module else None


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_run_downward(folder: str) -> None:
    layer_of = {name: layer for layer, names in enumerate(FLOORS[folder]) for name in names.split()}
    upward = []
    for module, imported in imports().items():
        entry = entry_of(module, folder)
        if entry is None:
            continue
        assert entry in layer_of, f"give {folder}/{entry} a layer in FLOORS of {__file__}"
        for other in sorted(imported & imports().keys()):
            below = entry_of(other, folder)
            if below not in (None, entry) and layer_of[below] >= layer_of[entry]:
                upward.append(f"{module} -> {other}")
    assert not upward, f"move what is imported to a lower layer, or pass it in: {upward}"


def test_no_module_imports_itself_through_others() -> None:
    known = {module: names & imports().keys() for module, names in imports().items()}
    try:
        graphlib.TopologicalSorter(known).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"move what these share to a module below them: {' <- '.join(error.args[1])}")


def test_packages_import_each_other_relatively() -> None:
    own = ("fusedacl", *PACKAGES)
    for module, imported in imports().items():
        absolute = {name for name in imported if name[1:].split(".")[0] in own and name[0] == "."}
        assert not absolute, f"{module}: write these imports with leading dots"
        unknown = {name for name in imported if name[0] != "."} - imports().keys() - {*PACKAGES}
        assert not unknown, f"{module}: there are no such modules, correct these imports"


def test_folders_are_small() -> None:
    too_large = {}
    for folder in {path.parent for path in source_files(".py")}:
        entries = [
            path.name
            for path in folder.iterdir()
            if path.name not in NO_CODE and path.suffix != ".so"
        ]
        if len(entries) > MAX_ENTRIES:
            too_large[str(folder.relative_to(ROOT))] = len(entries)
    assert not too_large, f"make sub-folders (at most {MAX_ENTRIES} entries each): {too_large}"


def test_files_are_short() -> None:
    too_long = {}
    for path in source_files(".py", ".c"):
        text = path.read_text(encoding="utf-8")
        limit = MAX_LINES_OF_TRITON if "@triton.jit" in text else MAX_LINES
        if text.count("\n") > limit:
            too_long[str(path.relative_to(ROOT))] = text.count("\n")
    assert not too_long, f"split by idea (at most {MAX_LINES} lines per file): {too_long}"


def test_lint_runs_this_file() -> None:
    _, lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:", 1)
    recipe = lint.split("\n\n")[0]
    assert "--noconftest tests/test_house.py" in recipe, "call this file in the Makefile's `lint`"
