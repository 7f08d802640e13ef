# make demo · make up · make test; the rest is what they are made of.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
STAMP := $(VENV)/.installed
# With one thread each (tests/conftest.py), and one more than there are cores: a third of the time, tests wait for processes.
TESTS_AT_ONCE ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() + 1))')

.DEFAULT_GOAL := help
.PHONY: help setup demo up test browser check bench-train bench-cotrain bench-serve bench-residency bench-api study format lock clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## make .venv and install exactly what requirements.lock names

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: $(STAMP) ## the main job on a real model and real data, in minutes
	@$(BIN)/python -m scripts.demo

up: $(STAMP) ## run the service on http://127.0.0.1:8000 until Ctrl-C
	@$(BIN)/python -m worker.up

test: check browser ## everything CI runs
	$(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadgroup

browser: ## Chromium for the tests of the dashboard, where it is missing (root or sudo)
	@scripts/browser.sh

check: $(STAMP) ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-train: $(STAMP) ## a training step against stock PEFT's, about 10 minutes
	@$(BIN)/python -m benchmarks.training

bench-cotrain: $(STAMP) ## small jobs together against one after the other, about 10 minutes
	@$(BIN)/python -m benchmarks.cotraining

bench-serve: $(STAMP) ## thousands of adapters against generate and stock PEFT, about 15 minutes; DEVICE=cuda
	@$(BIN)/python -m benchmarks.serving --device $(or $(DEVICE),cpu)

bench-residency: $(STAMP) ## an engine that follows a database of 10,000 adapters, about 3 minutes
	@$(BIN)/python -m benchmarks.residency

bench-api: $(STAMP) ## polling beside a constant answer, 10,000 jobs, about 8 minutes
	@$(BIN)/python -m benchmarks.api

study: $(STAMP) ## what UORA is worth: makes the runs that are missing, hours in all, then the pages of docs/
	@$(BIN)/python -m benchmarks.quality
	@$(BIN)/python -m benchmarks.quality report

format: $(STAMP) ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## resolve requirements.lock anew
	scripts/lock.sh

clean: ## remove the installation, not the service's data
	rm -rf $(VENV)
