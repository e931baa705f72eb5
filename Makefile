# From a clone: `make train` trains, samples and sums up the demo; `make test` runs the whole suite.
#   make train RESUME=1   continue the run in runs/demo      make train FRESH=1   start over, the old run moved aside
#   make train EXPERIMENT=demo_janus                         another family, in runs/demo_janus
#   make train ARGS="train.train_iters=200 optim.lr=5e-4"    any other key of the configuration

TORCH ?= torch==2.13.0
EXPERIMENT ?= demo
ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

# A version manager may offer a python3.12 that does not start: each is tried, not looked up.
SUITABLE := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done)
# 2 processes on a CPU; with GPUs as many as divide the demo's 8 rows. NPROC=n overrides it.
RANKS := import torch; n = torch.cuda.device_count(); print(max(k for k in (1, 2, 4, 8) if k <= n) if n else 2)
IF_EXISTS := $(if $(RESUME),resume,$(if $(FRESH),restart,error))

.DELETE_ON_ERROR:
.PHONY: help train data test test-fast test-all lint format check clean

help:
	@sed -n '1,4s/^# *//p' Makefile; echo "Also: make data test test-fast test-all lint format check clean"

train: $(BIN)/.demo data
	@if [ $(IF_EXISTS) = error ] && [ -e runs/$(EXPERIMENT) ]; then echo "error: runs/$(EXPERIMENT) already holds a run:" \
	  "RESUME=1 continues it, FRESH=1 starts over." >&2; exit 2; fi
	nproc=$${NPROC:-$$($(BIN)/python -c '$(RANKS)')}; $(BIN)/torchrun --standalone --nproc-per-node $$nproc \
	  -m megatron_mm.train experiment=$(EXPERIMENT) train.micro_batch_size=$$((8 / nproc)) run.if_exists=$(IF_EXISTS) $(ARGS)
	$(BIN)/python -m megatron_mm.demo run=runs/$(EXPERIMENT)

data: data/mnist/dataset.json

data/mnist/dataset.json: | $(BIN)/.demo
	env -u OMP_NUM_THREADS $(BIN)/python -m megatron_mm.data.prepare mnist --out data/mnist

test: $(BIN)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not exhaustive"

test-fast: $(BIN)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not exhaustive"

test-all: $(BIN)/.dev
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(BIN)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Stamps: what a virtual environment holds, until pyproject.toml changes.
$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11 or 3.12 found; install one, or say make PYTHON=/path/to/python." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that another build of it (say a CPU one) can be put in its place with TORCH=...
$(BIN)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	touch $@

$(BIN)/.demo: pyproject.toml | $(BIN)/.torch
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[demo]"
	touch $@

$(BIN)/.dev: pyproject.toml | $(BIN)/.torch
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	touch $@ $(BIN)/.demo
