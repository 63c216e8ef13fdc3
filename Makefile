# Needs Python 3.11 or newer with venv; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := -c constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt

# Tests at a time. Those of several ranks start up to four processes of their own.
TEST_PROCESSES ?= 2

# The range of Triton that is claimed: both ends are compiled by `make targets`.
OLDEST_TRITON := 3.3.1
NEWEST_TRITON := 3.9.0

.PHONY: demo test lint targets ptx ptx-counts counts bench bench-quick bench-gpu docs clean

demo: $(VENV)/.demo
	$(BIN)/fusedacl train

# A file's tests stay in one process: some of them share ranks that wait for work.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib build/typed
	$(PIP) install -q --no-deps --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy

# Every Triton kernel for every GPU, compiled without a GPU. The pinned Triton's turn is in `test`.
targets: build/triton-$(OLDEST_TRITON)/.installed build/triton-$(NEWEST_TRITON)/.installed
	for version in $(OLDEST_TRITON) $(NEWEST_TRITON); do PYTHONPATH=build/triton-$$version \
	  $(BIN)/python -m fusedacl.kernels.targets --quiet --keep-exceptions || exit 1; done

build/triton-%/.installed: $(VENV)/.dev
	$(PIP) install -q --no-deps --upgrade --target build/triton-$* triton==$*
	touch $@

# Every kernel's tests on the machine for PTX, as a V100, a T4 and an A100 would run them, without
# and with the errors that their approximate functions may have; `test` runs a small part.
ptx: $(VENV)/.dev
	PTX_WHOLE=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) tests/ptx

# What each kernel asks of a multiprocessor's units there.
ptx-counts: $(VENV)/.dev
	for capability in 70 75 80; do PYTHONPATH=tests/support TRITON_CACHE_DIR=build/ptx \
	  $(BIN)/python -m ptx $$capability || exit 1; done

# Operations, bytes, launches and host reads beside those accepted (`test` compares them too).
counts: $(VENV)/.dev
	$(BIN)/python -m fusedacl.benchmarks.counts

# Everything, small: under two minutes on two idle cores, files in runs/bench/.
bench-quick: $(VENV)/.dev
	$(BIN)/fusedacl bench all --preset quick

# Everything at full size; texts of MRPC where FUSEDACL_DATA names the real data sets.
bench: $(VENV)/.dev
	$(BIN)/fusedacl bench all

# For a machine with an NVIDIA GPU: the tests that need one, then the benchmarks.
bench-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/fusedacl bench all --device cuda

# The generated pages, from the files in docs/results/ and benchmarks/results/.
docs: $(VENV)/.dev
	$(BIN)/python -m fusedacl.kernels.targets --write docs/kernels.md
	$(BIN)/python -m fusedacl.engine.reports.results_page docs/results --output docs/results.md
	$(BIN)/python -m fusedacl.benchmarks.pages.performance benchmarks/results/* --output docs/performance.md \
	  --readme README.md

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fusedacl needs Python 3.11 or newer; $(PYTHON) is" \
	  "$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first, and alone: the pin takes a CPU build where one is at hand, and what follows is then
# content with it. An unpinned torch would draw gigabytes of CUDA packages.
$(VENV)/.torch: $(VENV)/bin/python $(SOURCES)
	$(PIP) install -q $(CONSTRAINTS) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch
	$(PIP) install -q $(CONSTRAINTS) -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch
	$(PIP) install -q $(CONSTRAINTS) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
