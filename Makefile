# Two commands matter: `make demo` and `make test`. Each sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Of `make test`. Each takes up to 3 GB of memory; one of them runs all the tests that start Ray.
WORKERS ?= 2
export OMP_WAIT_POLICY := PASSIVE
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup demo test lint format bench protos docs figures chart corpus clip bundle lock clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml clients/python/pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@# Compiling all 20,000 files takes about as long as installing them; what is used is compiled when it is imported.
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable clients/python --editable ".[server,train,dev]"
	@touch $@

setup: $(STAMP)  ## Make the virtual environment, everything pinned by constraints.txt

demo: $(STAMP)  ## Start the service on the embedded bundle, call every method, write out/demo/
	$(BIN)/python clients/demo

test: $(STAMP) tests/foreign/node_modules/.package-lock.json  ## Run the whole suite
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --no-loadscope-reorder --durations 15

lint: $(STAMP)  ## Check style, types, the contract and the arrows between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=clients/demo $(BIN)/mypy clients/demo/*.py
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

format: $(STAMP)  ## Format the code and the contract
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

bench: $(STAMP)  ## Measure; prints a table and writes out/bench/*.json
	$(BIN)/python -m benchmarks.encode

protos: $(STAMP)  ## Generate the stubs and docs/api.md from protos/
	$(BIN)/python clients/python/tools/generate.py
	$(BIN)/python docs/reference

docs: $(STAMP)  ## Write docs/api.md from the contract
	$(BIN)/python docs/reference

figures: $(STAMP)  ## Write the README's figures from the embedded bundle and out/bench/
	$(BIN)/python -m benchmarks.readme

chart: $(STAMP)  ## Write what the chart holds of the code: alerts, dashboard, environment, schema of the settings
	$(BIN)/python -m deployments.chart

tests/foreign/node_modules/.package-lock.json: tests/foreign/package-lock.json
	cd tests/foreign && npm ci --ignore-scripts --no-audit --no-fund

training/corpus/node_modules/.package-lock.json: training/corpus/package-lock.json
	cd training/corpus && npm ci --ignore-scripts --no-audit --no-fund

work/corpus/corpus.parquet: $(STAMP) training/corpus/node_modules/.package-lock.json
	$(BIN)/python -m training.corpus.build --out work/corpus

corpus: work/corpus/corpus.parquet  ## Fetch the drawings and rasterise them

clip: corpus  ## Train the towers (hours on CPUs; resumes by `--resume`)
	$(BIN)/python -m training.clip --out work/clip

bundle: corpus  ## From trained towers (work/clip) to bundles/emoji: dictionaries, modality, cards, report
	$(BIN)/python -m training.bundle_all --test

clean:  ## Remove what was made, but not what was trained
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache

lock:  ## Write constraints.txt from what is installed
	$(BIN)/pip freeze --exclude-editable | grep -v ' @ ' > constraints.txt
