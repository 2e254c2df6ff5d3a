# Everything runs in virtual environments of its own: build/venv holds the wheel, .venv the editable install for daily work.
# pip takes its settings from the user's own configuration.

PYTHON ?= python3
BIN := build/venv/bin
SOURCES := pyproject.toml README.md LICENSE models solvers dse studies
SOURCE_FILES := $(shell find $(SOURCES) -name __pycache__ -prune -o -print)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME

.DELETE_ON_ERROR:
.PHONY: help demo test bench peers gpu quick clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build/installed ## a Pareto front of memories in build/demo/pareto.csv
	mkdir -p build/demo
	$(BIN)/memsplit study hardware_pareto --out build/demo/pareto.csv

test: build/tools ## all tests, style and types, on the installed wheel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p memsplit
	MEMSPLIT_TEST_WHEEL=1 $(BIN)/pytest -n 2

bench: build/tools ## every benchmark against its target; rows in build/bench.json
	$(BIN)/python benchmarks/run.py

peers: build/tools ## one decode step beside other tools, which it installs from PyPI into build/peers
	$(BIN)/python benchmarks/peers.py --env build/peers

gpu: build/tools ## where there is a GPU: tests of CUDA, a profile, both run studies of four layers; in build/gpu, below an hour
	MEMSPLIT_TEST_WHEEL=1 $(BIN)/pytest tests/test_runtime.py tests/test_machine.py tests/test_run_recompute_split.py -k "cuda or gpu"
	mkdir -p build/gpu
	$(BIN)/memsplit profile --device cuda --out build/gpu/machine.toml
	$(BIN)/memsplit study run_recompute_split --device cuda --machine build/gpu/machine.toml --layers 4 --points 5 --out build/gpu/split.csv
	$(BIN)/memsplit study run_cache_ratio --device cuda --machine build/gpu/machine.toml --layers 4 --points 5 --out build/gpu/ratio.csv

quick: .venv/installed ## tests on an editable install, up to the first failure
	.venv/bin/pytest -x -q

clean: ## remove build/ and .venv/
	rm -rf build .venv *.egg-info

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memsplit needs Python 3.11 or newer; name one, as in: make PYTHON=python3.12")'
	$(PYTHON) -m venv $*

# Built from a copy: a build/lib left in the tree would put deleted modules into the wheel. Folders are prerequisites, too, so
# that a deleted module makes a new wheel.
build/wheel: $(SOURCE_FILES) | $(BIN)/python
	rm -rf build/source $@
	mkdir -p build/source
	cp -R $(SOURCES) build/source
	$(BIN)/pip wheel -q --no-deps --wheel-dir build/source/wheel ./build/source
	mv build/source/wheel $@
	rm -rf build/source

# The first line brings new dependencies; the second replaces a wheel of the same version.
build/installed: build/wheel
	$(BIN)/pip install -q build/wheel/*.whl
	$(BIN)/pip install -q --no-deps --force-reinstall build/wheel/*.whl
	touch $@

build/tools: build/installed pyproject.toml
	$(BIN)/pip install -q "$$(ls build/wheel/*.whl)[dev]"
	touch $@

.venv/installed: pyproject.toml | .venv/bin/python
	.venv/bin/pip install -q --editable '.[dev]'
	touch $@
