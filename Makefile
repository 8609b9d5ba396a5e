# The verbs of this project, the same by hand and in CI. Every one sets itself up first; nothing here needs a GPU or root
# (setup-system alone calls the system's package manager).
.DEFAULT_GOAL := help
.PHONY: help setup setup-system demo base check test test-slow bench docs fix wheel

BIN := .venv/bin
# Two worker processes with one thread each: on two cores faster than one process with two, and the same numbers everywhere.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

help:  ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

setup:  ## make .venv with everything, at pinned versions (once; later calls return at once)
	@scripts/setup.sh

setup-system:  ## install the system's parts that set-up needs (Debian and Ubuntu; asks for root)
	@scripts/setup_system.sh

demo: setup  ## tune the built-in base on dates, amounts and units from English to Hebrew (minutes)
	@$(BIN)/python scripts/demo.py

base: setup  ## make the built-in base again by its recipe (up to 90 minutes)
	@$(BIN)/python -m recipes.tiny_phi

check: setup  ## formatter, linter, types, import rules
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/pyright --pythonpath $(BIN)/python

test: check  ## everything that must hold, in about 15 minutes on two cores, with coverage shown
	@$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not gpu" --cov=kivnun --cov-report=term:skip-covered -q

test-slow: setup  ## sweeps, many kills, the base's recipe; up to an hour
	@$(PYTEST) -m "slow and not gpu" -q -rs

bench: setup  ## measure, and write dated files to benchmarks/
	@$(BIN)/python -m benchmarks

docs: setup  ## write the generated pages of docs/reference again
	@for script in scripts/reference_*.py; do $(BIN)/python $$script; done

fix: setup  ## format, and mend what the linter can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

wheel: setup  ## build the wheel, install it in a clean environment and run it
	@scripts/wheel_smoke.sh
