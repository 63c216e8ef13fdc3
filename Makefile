# Needs Python 3.11 or newer with venv; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := -c constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt

# Test files at a time; tests of several ranks start up to four processes of their own. A file runs
# in one process, because its tests share ranks; conftest.py adds other files with the same ranks,
# and puts the longest first.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest
IN_PARALLEL := --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# The supported range of Triton: `make targets` compiles with both ends and the pinned version.
OLDEST_TRITON := 3.3.1
NEWEST_TRITON := 3.9.0

.PHONY: demo test test-portable combinations lint targets ptx ptx-counts counts gpu bench bench-quick bench-gpu docs clean

demo: $(VENV)/.demo
	$(BIN)/fusedacl train

test: $(VENV)/.dev
	$(PYTEST) $(IN_PARALLEL)

# Once more with the arithmetic of a processor without vector instructions: the folders that compute
# with PyTorch and compare within bounds. What reads, writes, reports or starts processes does not
# depend on it; nor do the kernels for GPUs, which Triton's interpreter computes in NumPy; and exported
# models and encoders of other families run the same functions as the model's own tests.
PORTABLE := $(addprefix tests/,kernels/contrastive kernels/gradients $(addprefix engine/,backends \
  inference integrations model objectives training))
WITHOUT := $(addprefix tests/,kernels/contrastive/gpu kernels/gradients/test_gpu.py \
  $(addprefix engine/,inference/export model/test_adapters_and_export.py model/test_encoder_zoo.py \
  model/test_hugging_face.py training/logs training/storage))
test-portable: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=default $(PYTEST) $(IN_PARALLEL) -m 'not real_data' \
	  $(PORTABLE) $(addprefix --ignore ,$(WITHOUT))

# Training runs with combinations of options drawn at random: `make combinations SEED=3 NUMBER=50`.
SEED ?= 1
NUMBER ?= 50
combinations: $(VENV)/.dev
	COMBINATIONS_SEED=$(SEED) COMBINATIONS_NUMBER=$(NUMBER) $(PYTEST) \
	  tests/distributed/test_option_combinations.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -q --noconftest tests/test_house.py
	rm -rf build/lib build/typed
	$(PIP) install -q --no-deps --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy

# Every Triton kernel for every GPU, compiled without a GPU by the pinned Triton, whose tables are in
# docs/kernel_resources.md. The others compile for one GPU of each kind of matrix unit what any two
# properties of a kernel need to occur together; `test` compiles the smaller files for one GPU. CI has
# CHOICE=--pairs: such a part by the pinned Triton too, for all GPUs.
CHOICE ?=
targets: build/triton-$(OLDEST_TRITON)/.installed build/triton-$(NEWEST_TRITON)/.installed
	$(BIN)/python -m fusedacl.kernels.targets --check docs/kernel_resources.md $(CHOICE)
	for version in $(OLDEST_TRITON) $(NEWEST_TRITON); do PYTHONPATH=build/triton-$$version \
	  $(BIN)/python -m fusedacl.kernels.targets --quiet --keep-exceptions --pairs \
	  --capability 70 80 90 100 || exit 1; done

build/triton-%/.installed: $(VENV)/.dev
	$(PIP) install -q --no-deps --upgrade --target build/triton-$* triton==$*
	touch $@

# Every kernel's tests on the machine for PTX, as a V100, a T4 and an A100 would run them, without
# and with the errors that their approximate functions may have; `test` runs a small part.
ptx: $(VENV)/.dev
	PTX_WHOLE=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) tests/ptx

# Use of each execution unit of a multiprocessor by every kernel, counted there, beside the accepted
# numbers; `python -m kernel_counts --write docs/gpu_by_the_model.md` accepts them.
KERNEL_COUNTS := PYTHONPATH=tests/support TRITON_INTERPRET=0 TRITON_CACHE_DIR=build/ptx \
  $(BIN)/python -m kernel_counts
ptx-counts: $(VENV)/.dev
	$(KERNEL_COUNTS)

# Operations, bytes, launches and host reads beside the accepted numbers, and the kernels' work for
# small inputs (`test` compares all of them too).
counts: $(VENV)/.dev
	$(BIN)/python -m fusedacl.benchmarks.counts
	$(KERNEL_COUNTS) --small

# All benchmarks at small size: a good two minutes on two idle cores, files in runs/bench/.
bench-quick: $(VENV)/.dev
	$(BIN)/fusedacl bench all --preset quick

# All benchmarks at full size; texts of MRPC where FUSEDACL_DATA names the real data sets.
bench: $(VENV)/.dev
	$(BIN)/fusedacl bench all

# On a machine with an NVIDIA GPU, in ten minutes and without a network: smoke test, tests, loss,
# angle, tuning and steps, each in its time; `make gpu BUDGET=240` cuts from the end, and
# `fusedacl bench report` makes pages of the files. It takes the Python that is there.
BUDGET ?= 570
gpu:
	$(PYTHON) -m fusedacl.benchmarks.gpu --budget $(BUDGET)

# On a machine with an NVIDIA GPU: the tests that need one, then the benchmarks.
bench-gpu: $(VENV)/.dev
	$(PYTEST) tests/gpu
	$(BIN)/fusedacl bench all --device cuda

# Pages generated from the files in docs/results/ and benchmarks/results/, and by trying encoders.
docs: $(VENV)/.dev
	$(BIN)/python -m fusedacl.kernels.targets --write docs/kernel_resources.md
	$(BIN)/python -m fusedacl.engine.reports.results_page docs/results --output docs/results.md \
	  --step benchmarks/results/amd-epyc-2core/step.json
	PYTHONPATH=tests/support $(BIN)/python -m encoder_zoo docs/encoders.md
	$(BIN)/python -m fusedacl.benchmarks.pages.performance benchmarks/results/* --output docs/performance.md \
	  --readme README.md

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fusedacl needs Python 3.11 or newer; $(PYTHON) is" \
	  "$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch is installed first and alone: its pin is met by a CPU build where there is one, and the other
# packages then accept it. An unpinned torch would install gigabytes of CUDA packages.
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
