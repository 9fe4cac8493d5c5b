# install, demo, test, check: CI and the README call these and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
# DeepSpeed chooses its accelerator from what it finds on the machine that it runs on; a login node has no GPU, so say it.
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

# What only root on Debian can install: a second real volume (Colin27), a browser to open reports in, and Slurm for
# slurm/devcluster.
DEBIAN_PACKAGES := mricron-data chromium slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin mariadb-server munge iproute2

.PHONY: help install demo study-small study-small-quick study-small-monai test test-unit test-numerics soak check bench bench-ingest bench-stream bench-step bench-training bench-less-work bench-plan bench-checkpoint bench-simulate format clean debian-packages

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

.PRECIOUS: .venv/installed-% .venv/op-built-%

.venv/installed-%: pyproject.toml setup.py mimscale/store/_chunks.c mimscale/store/_guard.h constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	touch $@

install: .venv/installed-demo ## install into .venv, with the demo's data

demo: .venv/op-built-demo ## the main job on real data, on this machine, without Slurm
	PATH="$(CURDIR)/$(BIN):$$PATH" bash mimscale/recipes/demo/run.sh demo

STUDY_DIR ?= study_small
study-small: .venv/op-built-demo debian-packages ## the paper's claims on deformed brains, about 150 minutes on 2 cores; goes on after a stop
	OMP_NUM_THREADS=1 $(BIN)/mimscale study studies/small run_dir=$(STUDY_DIR)

study-small-quick: .venv/op-built-demo debian-packages ## the same, smaller, in about 10 minutes
	OMP_NUM_THREADS=1 $(BIN)/mimscale study studies/small_quick run_dir=$(STUDY_DIR)_quick

# The control trains on the same crops as nodes of the study, by those nodes' configs.
MONAI_TWIN = import json, sys; print(next(n["folder"] for n in json.load(sys.stdin)["nodes"] if n["label"] == "pretrain mae, seed $*"))
$(STUDY_DIR)/monai/%/contract.json:
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pretrain_monai_mae.py \
	  "$$($(BIN)/mimscale study studies/small run_dir=$(STUDY_DIR) --dry-run --json | $(BIN)/python -c '$(MONAI_TWIN)')" $(@D)

study-small-monai: study-small ## MONAI's masked autoencoder as a control, after study-small and in its folder
	$(MAKE) --jobs 2 $(foreach seed,11 12 13,$(STUDY_DIR)/monai/$(seed)/contract.json)
	OMP_NUM_THREADS=1 $(BIN)/mimscale study studies/small_monai run_dir=$(STUDY_DIR) data.monai.path=$(abspath $(STUDY_DIR))/monai

# Elsewhere the tests that need them skip; in CI a skip is a failure.
debian-packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg --status $(DEBIAN_PACKAGES) >/dev/null 2>&1; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(DEBIAN_PACKAGES); fi

# DeepSpeed builds its shared-memory op on first use; two processes that build it at once wait for each other's lock.
.venv/op-built-%: .venv/installed-%
	$(BIN)/python -m mimscale.train.engine
	touch $@

test: .venv/op-built-test debian-packages ## install what tests need and run all of them
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-unit test-numerics
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integration tests/fault
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm

# Neither starts more than one process at once, so they share two cores; what they print comes when they end.
test-unit test-numerics: test-%:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/$*

soak: .venv/op-built-test debian-packages ## the long tests: hundreds of kills; dead nodes, time limits and crowds on a Slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fault tests/slurm -m soak -o faulthandler_timeout=0

check: .venv/installed-check ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

HARDWARE ?= $(shell uname -n)
bench-ingest: .venv/installed-test ## conversion speed, sizes, memory and scale of ingest, on one core; see benchmarks/
	OMP_NUM_THREADS=1 taskset -c 0 $(BIN)/python benchmarks/bench_ingest.py --hardware $(HARDWARE)

bench-stream: .venv/installed-bench debian-packages ## crops a second of our reader and its peers, one core each
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_stream.py --hardware $(HARDWARE)

bench-step: .venv/op-built-bench ## the training step of ours and of its peers, against its matrix products
	$(BIN)/python benchmarks/bench_step.py --hardware $(HARDWARE)

bench-training: .venv/op-built-bench ## training in three modes, and its scaling over ranks of this machine
	$(BIN)/python benchmarks/bench_training.py --hardware $(HARDWARE)

bench-less-work: .venv/op-built-bench ## ways to do less work in a step, and what they do to the loss
	$(BIN)/python benchmarks/bench_less_work.py --hardware $(HARDWARE)

bench-plan: .venv/op-built-bench ## what `mimscale plan` estimates, beside what this machine measures
	$(BIN)/python benchmarks/bench_plan.py --hardware $(HARDWARE)

bench-checkpoint: .venv/op-built-bench ## how long training stands still for a ViT-B's checkpoint, and how fast it is read
	$(BIN)/python benchmarks/bench_verbs.py --hardware $(HARDWARE) checkpoint pretrain_mae_vit_b

bench-simulate: .venv/op-built-bench ## what grows with ranks and volumes, up to 4 096 ranks, in one process
	$(BIN)/python benchmarks/bench_verbs.py --hardware $(HARDWARE) simulate

# Two samples a step, short rounds: enough to see an error or a large change, in minutes. The names of such results say so.
QUICK := --hardware $(HARDWARE)-quick
bench: .venv/op-built-bench debian-packages ## short forms of all benchmarks, below 15 minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_ingest.py $(QUICK) --repeats 2 --receipts 5000 --rows 20000 --mb-a-run 10 --edge-factor 1
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_stream.py $(QUICK) --repeats 2 --seconds 0.1 --crops 96 --conditions warm --ct-edge 160
	$(BIN)/python benchmarks/bench_step.py $(QUICK) --quick --repeats 1 --seconds 0.5 --no-compile
	$(BIN)/python benchmarks/bench_less_work.py $(QUICK) --quick --repeats 1 --seconds 0.5 --train-seconds 3 --sizes "ViT-B 96/16"
	$(BIN)/python benchmarks/bench_training.py $(QUICK) --steps 2 --windows 2 --memory-ranks 1 2 --edge 128
	$(BIN)/python benchmarks/bench_verbs.py $(QUICK) checkpoint pretrain_mae_vit_s --repeats=1
	$(BIN)/python benchmarks/bench_verbs.py $(QUICK) simulate --nodes=64 --volumes=50000

format: .venv/installed-check ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and the demo's output
	rm -rf .venv demo study_small study_small_quick build *.egg-info
