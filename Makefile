# install, demo, test, check: CI and the README call these and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
# DeepSpeed chooses its accelerator from what it finds on the machine that it runs on; a login node has no GPU, so say it.
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: help install demo test check bench-stream format clean debian-test-data

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

.PRECIOUS: .venv/installed-% .venv/op-built-%

.venv/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@

install: .venv/installed-demo ## install into .venv, with the demo's data

demo: .venv/op-built-demo ## the main job on real data, on this machine, without Slurm
	PATH="$(CURDIR)/$(BIN):$$PATH" bash mimscale/recipes/demo/run.sh demo

# The second real volume of the tests: Colin27 and its labels. Only root on Debian can install it; elsewhere tests skip.
debian-test-data:
	@if [ ! -e /usr/share/mricron/templates/ch2.nii.gz ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mricron-data; fi

# DeepSpeed builds its shared-memory op on first use; two processes that build it at once wait for each other's lock.
.venv/op-built-%: .venv/installed-%
	$(BIN)/python -m mimscale.train.engine
	touch $@

test: .venv/op-built-test debian-test-data ## install what tests need and run all of them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/numerics
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration tests/fault

check: .venv/installed-check ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

HARDWARE ?= unnamed
bench-stream: .venv/installed-bench debian-test-data ## crops a second against all peers; HARDWARE=name names the result
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_stream.py --hardware $(HARDWARE)

format: .venv/installed-check ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and the demo's output
	rm -rf .venv demo build *.egg-info
