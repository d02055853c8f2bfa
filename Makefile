# All set-up and all daily commands; `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CODE := hf_precond trainer_ext scripts examples tests

# Two test processes on two cores: more threads in each would only fight.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-short test test-slow docs check format clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-12s %s\n", $$1, $$2}'

setup: $(READY) ## create the virtual environment with all pinned packages

# torch goes first and alone: a resolver that sees everything at once may fetch a second build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[trainer,scripts,plots,dev,docs,crosscheck]'
	touch $@

demo: $(READY) ## pretrain a small GPT-2 on the standard library's source (below 10 minutes)
	$(BIN)/python scripts/train_lm.py configs/lm/demo.yaml

demo-short: $(READY) ## the same in about a minute
	$(BIN)/python scripts/train_lm.py configs/lm/demo_short.yaml

test: $(READY) ## run the tests
	$(PYTEST) -m "not slow"

test-slow: $(READY) ## run the slow tests
	$(PYTEST) -m slow

docs: $(READY) ## build the documentation into outputs/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: $(READY) ## check format, lint, types and import directions
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY) ## format the code and repair what the linter can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean: ## remove caches, builds and outputs; keeps the virtual environment
	rm -rf build dist outputs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
