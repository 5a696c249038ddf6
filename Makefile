# Every target sets up what it needs in .venv; nothing has to be installed by hand but Python and make.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Run from a pipe or a CI job, nothing may wait for an answer or draw over its own lines.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz lint format typecheck docs bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Installed again only when what should be installed has changed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --progress-bar off --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## Train RepViT on handwritten digits, fuse its checkpoint, compare and draw
	$(BIN)/python examples/digits.py

test: $(INSTALLED)  ## Run every test
	$(BIN)/python -m pytest -n 2

fuzz: $(INSTALLED)  ## Compile 5,000 random networks (hours; FUZZ=n for another number)
	REPARAM_FUZZ=$(or $(FUZZ),5000) $(BIN)/python -m pytest tests/reparam/test_random_networks.py -k test_random_network

lint: $(INSTALLED)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(INSTALLED)  ## Check types, strictly
	$(BIN)/mypy -p reparam

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(INSTALLED)  ## Build the documentation as a site, into build/site; a broken link is an error
	$(BIN)/python -m mkdocs build --quiet --strict

bench: $(INSTALLED)  ## Measure compile time, memory, coverage and deploy graphs (an hour)
	$(BIN)/python benchmarks/compile_time.py --check
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/memory.py --check
	$(BIN)/python benchmarks/deploy.py --check

clean:  ## Remove what builds, tests and the demo wrote; keep .venv
	rm -rf build dist demo_output *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
