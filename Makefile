# Two commands matter: `make demo` and `make test`. Each sets up what it needs: .ci/environment has the settings of that.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# Of `make test`. Each takes up to 3 GB of memory; one of them runs all the tests that start Ray.
WORKERS ?= 2
export VENV WORKERS
export OMP_WAIT_POLICY := PASSIVE
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup serving demo test lint format bench protos docs figures chart corpus clip bundle lock clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## Make the virtual environment, everything pinned by constraints.txt
	@.ci/environment test

serving:
	@.ci/environment serve

demo: serving  ## Start the service on the embedded bundle, call every method, write out/demo/
	@TMPDIR=$$(.ci/temporary 200) && export TMPDIR && $(BIN)/python clients/demo

test: setup  ## Run the whole suite
	@.ci/packages
	@.ci/test

lint: setup  ## Check style, types, the contract and the arrows between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=clients/demo $(BIN)/mypy clients/demo/*.py
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code

format: setup  ## Format the code and the contract
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

bench: setup  ## Measure; prints a table and writes out/bench/*.json
	$(BIN)/python -m benchmarks.encode

protos: setup  ## Generate the stubs and docs/api.md from protos/, and the synchronous client from the asyncio one
	$(BIN)/python clients/python/tools/generate.py
	$(BIN)/python clients/python/tools/sync_side.py
	$(BIN)/python docs/reference

docs: setup  ## Write docs/api.md from the contract
	$(BIN)/python docs/reference

figures: setup  ## Write the figures of the README and of docs/generation.md from the embedded bundle and out/bench/
	$(BIN)/python -m benchmarks.readme
	$(BIN)/python -m benchmarks.generation_page
	$(BIN)/python -m benchmarks.steering_page

chart: setup  ## Write what the chart holds of the code: alerts, dashboard, environment, schema of the settings
	$(BIN)/python -m deployments.operations.chart

training/corpus/node_modules/.package-lock.json: training/corpus/package-lock.json
	cd training/corpus && npm ci --ignore-scripts --no-audit --no-fund

work/corpus/corpus.parquet: training/corpus/node_modules/.package-lock.json | setup
	$(BIN)/python -m training.corpus.build --out work/corpus

corpus: work/corpus/corpus.parquet  ## Fetch the drawings and rasterise them

# A step frees and takes the same large blocks again: kept by the process, 8% of its time is saved.
clip: export MALLOC_MMAP_THRESHOLD_ := 33554432
clip: export MALLOC_TRIM_THRESHOLD_ := 17179869184
clip: export MALLOC_TOP_PAD_ := 268435456
clip: corpus  ## Train the towers (an hour or two on one core with AMX; resumes by `--resume`)
	$(BIN)/python -m training.towers.train --out work/clip

bundle: corpus  ## From trained towers (work/clip) to bundles/emoji: dictionaries, modality, cards, report
	$(BIN)/python -m training.build.embedded_steps --test

clean:  ## Remove what was made, but not what was trained
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache

lock:  ## Write constraints.txt from what is installed
	$(BIN)/python -m pip freeze --exclude-editable | grep -v ' @ ' > constraints.txt
