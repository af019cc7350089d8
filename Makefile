# Everything runs in .venv, which the first target that needs it makes.
# Another interpreter or torch:  make distclean && make setup PYTHON=python3.12 TORCH=torch==2.8.0

PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
# Naming torch in every call keeps the version that was installed first.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check "$(TORCH)"
# A process a core, each with whole files of tests;  make test WORKERS=  runs them in one process.
WORKERS := -n auto --maxprocesses 4 --dist loadfile
EXAMPLES = $(shell grep -l '^if __name__ == "__main__"' examples/*.py)

# Touched after an installation has succeeded, so that an interrupted one is done again.
TORCH_READY := .venv/.torch-ready
DEMO_READY := .venv/.demo-ready
DEV_READY := .venv/.dev-ready
BENCH_READY := .venv/.bench-ready
MODELS_READY := .venv/.models-ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format bench bench-bilevel bench-memory bench-models bench-scaling bench-distributed gpu examples docs dist clean distclean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV_READY) ## Install the package and its development tools into .venv

demo: $(DEMO_READY) ## Meta-learn glyph recognition with iMAML; results in out/imaml
	$(BIN)/python examples/imaml.py --out out/imaml

test: $(DEV_READY) ## Run the tests and doctests, but for those marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(WORKERS) -m "not slow"

test-all: $(MODELS_READY) ## Run every test and doctest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(WORKERS)

lint: $(DEV_READY) ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(DEV_READY) ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(BENCH_READY) ## Compare speed with other libraries
	$(BIN)/python -m tests.benchmarks.run

bench-models: $(MODELS_READY) ## Measure published models beside plain torch
	$(BIN)/python -m tests.benchmarks.published_models

bench-bilevel: $(DEV_READY) ## Compare the loops of hf.bilevel on three problems
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.bilevel --plot out/bench-bilevel

bench-memory: $(DEV_READY) ## Measure peak memory
	$(BIN)/python -m tests.benchmarks.memory

bench-distributed: $(DEV_READY) ## Count and time what ranks send, and project it to many devices
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/benchmarks/distributed.py --out out/bench-distributed

bench-scaling: $(DEV_READY) ## Measure how time grows with the work
	$(BIN)/python -m tests.benchmarks.scaling

gpu: ## Measure and test on a GPU in 8 minutes, with the torch that is installed
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m tests.benchmarks.gpu

examples: $(DEMO_READY) ## Run every example; results in out/<name>
	@set -e; for script in $(EXAMPLES); do \
		name=$$(basename $$script .py); echo "== $$name"; \
		$(BIN)/python $$script --out out/$$name; \
	done

docs: $(DEV_READY) ## Build the API pages and the guides in docs-html
	$(BIN)/python .ci/docs.py docs-html

dist: $(DEV_READY) ## Build the wheel and the source archive in dist, and try the wheel
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install -qq --disable-pip-version-check "$(TORCH)" dist/*.whl
	build/empty/bin/python .ci/try_wheel.py

clean: ## Remove what the other targets made, except .venv
	rm -rf out docs-html dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find hyperfunc tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv too
	rm -rf .venv

$(TORCH_READY):
	@echo "Installing $(TORCH) into .venv, which takes a minute or two the first time"
	$(PYTHON) -m venv .venv
	$(PIP)
	@touch $@

$(DEMO_READY): pyproject.toml $(TORCH_READY)
	$(PIP) -e ".[examples]"
	@touch $@

# The dev extra includes the examples extra.
$(DEV_READY): pyproject.toml $(TORCH_READY)
	$(PIP) -e ".[dev]"
	@touch $(DEMO_READY) $@

# Not in the dev extra: where transformers is there, lightning imports it, which takes seconds.
$(MODELS_READY): pyproject.toml $(DEV_READY)
	$(PIP) -e ".[models]"
	@touch $@

$(BENCH_READY): pyproject.toml $(TORCH_READY)
	$(PIP) -e ".[bench]"
	@touch $@
