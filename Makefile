# `make help` lists the targets. Everything is installed into .venv once, and again when a pin changes.

PYTHON ?= python3
# Number of test processes. Two fit 24 GB: each may hold JAX, PyTorch and a server.
PYTEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DELETE_ON_ERROR:
.PHONY: help demo test lint clean

help:
	@echo "make demo   train the toy run: rewards rise, runs/toy/report.html shows how"
	@echo "make test   linters, types, all tests"
	@echo "make lint   linters and types alone"
	@echo "make clean  delete .venv and caches of the tools; runs/ stays"
	@echo "Needs Python 3.11 or newer: make demo PYTHON=python3.12"

demo: $(STAMP)
	@if test -e runs/toy/metrics.jsonl; then old=runs/toy-$$(date +%Y%m%d-%H%M%S); mv runs/toy $$old; echo "The last demo is kept in $$old."; fi
	$(BIN)/python -m segzero_jax.train --config configs/toy.yaml

# One thread per test process: processes whose libraries each use every core slow each other down. Tests that need most of the
# machine's memory or all its cores run after the others, one by one.
test: lint
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist=worksteal -m "not heavy"
	$(BIN)/python -m pytest -m heavy

lint: $(STAMP)
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy
	$(BIN)/shellcheck -x tpu/*.sh tpu/gke/*.sh

# SAM 2 is a separate step because it builds against the installed torch. --no-compile: most modules are never imported, and the
# others are compiled on import.
$(STAMP): pyproject.toml constraints.txt requirements-sam2.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; name a Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV): about 7 GB with PyTorch, a few minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --no-compile -c constraints.txt pip setuptools wheel
	@$(PIP) install -qq --no-compile -c constraints.txt --no-build-isolation -e '.[reward,dev]'
	@SAM2_BUILD_CUDA=0 $(PIP) install -qq --no-compile --no-deps --no-build-isolation -r requirements-sam2.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
