# Two commands do everything on a fresh machine (Python >= 3.11 and make):
#   make optimize    set up, then find the fastest safe configuration of latent_cfg for a P100
#   make test        set up, then run every check and test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Another torch build: make optimize TORCH_INDEX=https://download.pytorch.org/whl/cpu   (or cu126, cu130)
TORCH_INDEX ?=
# Data packages, for their files alone: what they would pull in (scikit-learn, torchvision) is not needed.
DATA := seglearn==1.2.5 kanjivg==20260714 jamdict-data==1.5 open_clip_torch==3.3.0

.PHONY: optimize test setup setup-dev check lint types imports pytest test-long gpu-check quality naive bench-promise \
	chaos-train clean help

help:
	@sed -n '1,3p' Makefile

optimize: setup
	$(BIN)/tuner optimize --workload latent_cfg --gpu p100

test: check pytest

setup: $(VENV)/.run-installed
setup-dev: $(VENV)/.dev-installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tuner needs Python >= 3.11; name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run-installed: pyproject.toml constraints.txt | $(BIN)/python
ifneq ($(TORCH_INDEX),)
	$(BIN)/pip install --disable-pip-version-check --quiet --index-url $(TORCH_INDEX) torch==2.13.0
endif
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[postgres,testing]'
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps $(DATA)
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.run-installed
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[postgres,dev]'
	@touch $@

check: lint types imports

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev
	$(BIN)/mypy

imports: setup-dev
	$(BIN)/lint-imports

pytest: setup-dev
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-long: setup-dev
	$(BIN)/pytest -m "slow and not gpu"

gpu-check: setup-dev
	$(BIN)/python -m benchmarks.gpu --out gpu-check

quality: setup
	$(BIN)/python -m benchmarks.quality

naive: setup
	$(BIN)/python -m benchmarks.naive

chaos-train: setup
	$(BIN)/python -m benchmarks.chaos_train

bench-promise: setup
	$(BIN)/python -m benchmarks.promise

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
