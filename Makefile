# Every target makes .venv and installs into it by itself: with uv where uv is installed, else with venv and pip.
#   make test ARGS="-k angles"     make demo ARGS="--steps 50"     make lint PYTHON=python3.12

PYTHON ?= python3
ARGS ?=

SHELL := bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test test-quick test-all test-networks lint notebooks docs benchmarks speed clean

BIN := .venv/bin
STAMP := .venv/.installed

NETWORKS := tests/cli/distill tests/cli/commands/test_distill.py tests/distillation tests/export/test_text.py tests/export/test_preprocess.py tests/test_docs.py tests/test_notebooks.py

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## make .venv and install the package for development

demo: $(STAMP) ## distil a small network from a big one and compare (ARGS="--seeds 3 --out runs/demo")
	@$(BIN)/lightning-rkd demo $(ARGS)

test: $(STAMP) ## tests, doctests, notebooks and recipes; all but the campaigns
	@$(BIN)/python -m pytest -m "not campaign" -n auto --dist worksteal $(ARGS)

test-quick: $(STAMP) ## the tests that take at most a few seconds each
	@$(BIN)/python -m pytest -m "not slow and not campaign" -n auto --dist worksteal $(ARGS)

test-all: test ## the same as test, then the campaigns: kills, two machines, SLURM
	@$(BIN)/python -m pytest -m campaign -n auto --dist worksteal $(ARGS)

test-networks: $(STAMP) ## install timm, transformers and others, and run the tests that need them
	@if command -v uv >/dev/null; then uv pip install --quiet --python $(BIN)/python --editable '.[networks]'; \
	  else $(BIN)/python -m pip install --quiet --editable '.[networks]'; fi
	@$(BIN)/python -m pytest -m "not campaign" -n auto --dist worksteal $(NETWORKS) -k "not shortened_cells or 11_text" $(ARGS)

lint: $(STAMP) ## style, formatting, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-cache

notebooks: $(STAMP) ## run every notebook from top to bottom
	@$(BIN)/python -m pytest tests/test_notebooks.py -v $(ARGS)

docs: $(STAMP) ## build the documentation site into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

benchmarks: $(STAMP) ## run every script in benchmarks/, one after the other
	@for script in $(filter-out benchmarks/speed.py,$(wildcard benchmarks/[a-z]*.py)); do echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

speed: $(STAMP) ## make the tables on speed anew, docs/speed (some 20 minutes on an idle machine)
	@$(BIN)/python benchmarks/speed.py --out docs/speed $(ARGS)

clean: ## remove caches and build outputs; .venv and runs/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The stamp is written last: an install that was interrupted or failed starts again. What it had fetched stays cached.
$(STAMP): pyproject.toml
	@rm -f $@
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lightning-rkd needs Python 3.11 or newer, and '$(PYTHON)' is not: $$("$(PYTHON)" --version 2>&1 | head -n 1)" >&2; \
	  echo "Name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing lightning-rkd into .venv: once, some 5 GB with PyTorch's CUDA libraries, usually one to a few minutes."
	@set -eo pipefail; if command -v uv >/dev/null; then \
	  $(BIN)/python -c '' 2>/dev/null || { rm -rf .venv; uv venv --python "$(PYTHON)" .venv; }; \
	  uv pip install --python $(BIN)/python --editable '.[dev]'; \
	else \
	  $(BIN)/python -c '' 2>/dev/null || { rm -rf .venv; "$(PYTHON)" -m venv --without-pip .venv; }; \
	  $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null 2>&1 \
	    || "$(PYTHON)" -m pip --python $(BIN)/python install --quiet pip; \
	  echo "pip: reading what is needed; downloads of 10 MB and more are listed"; \
	  PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --progress-bar off --editable '.[dev]' \
	    | awk '/\([0-9]+[0-9](\.[0-9]+)? MB\)|GB\)|^Installing/ {print substr($$0, 1, 120); fflush()}'; \
	fi
	@$(BIN)/python -c 'import torch, torchvision' || { \
	  echo "torch and torchvision were installed, but do not fit together (see the error above). They must be built for each" >&2; \
	  echo "other: both for CPU or both for the same CUDA, which means from the same index. Install a matching pair by hand," >&2; \
	  echo "then run make again. Nothing that fits is installed twice." >&2; \
	  exit 1; }
	@touch $@
