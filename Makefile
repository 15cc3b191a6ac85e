# Two commands do everything on a fresh clone: `make quickstart` and `make test`. Set-up is part of each.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUICK_DATA := data/synthetic-quick

help:
	@echo "make quickstart  set up, run a small GR-vs-DLRM study on a synthetic world, write report.html"
	@echo "make test        set up, lint, type-check and run the tests"
	@echo "make lint        ruff and mypy"
	@echo "make bench       speed and memory of this machine (docs/benchmarks)"
	@echo "make tpu-compiler  install what genrec plan compiles with (140 MB)"
	@echo "make compile-check  compile the kernels for TPUs and GPUs that are not here (twenty minutes; docs/benchmarks)"

# A Python 3.12 from .python-version (pyenv), from python3.12 on the path, or from uv, in that order.
$(READY): pyproject.toml constraints.txt
	@if python3.12 --version >/dev/null 2>&1; then python3.12 -m venv $(VENV); \
	elif python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then python3 -m venv $(VENV); \
	elif command -v uv >/dev/null; then uv venv --quiet --allow-existing --seed --python 3.12 $(VENV); \
	else echo "error: no Python 3.12 was found: install it (pyenv, your package manager, or uv) and run make again" >&2; exit 2; fi
	@echo "installing packages into $(VENV) (about a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY)

quickstart: $(READY)
	$(BIN)/genrec data synthetic --preset quick --out $(QUICK_DATA)
	$(BIN)/genrec sweep quickstart --data $(QUICK_DATA) --workers 2 --out runs/quickstart
	$(BIN)/genrec report runs/quickstart --out report.html
	@echo "open report.html"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2

bench: $(READY)
	$(BIN)/genrec bench

# The TPU compiler gets a folder of its own: where jax can import it, every start of jax looks for a TPU.
$(VENV)/libtpu/.ready: $(READY)
	@echo "installing the TPU compiler into $(VENV)/libtpu (140 MB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)/libtpu -c constraints.txt libtpu
	@touch $@

tpu-compiler: $(VENV)/libtpu/.ready

# ARGS: options of the command, for example ARGS="--only v5e backward".
compile-check: $(VENV)/libtpu/.ready
	$(BIN)/python -m benchmarks.tpu_compile $(ARGS)

.PHONY: help setup quickstart lint test bench tpu-compiler compile-check
