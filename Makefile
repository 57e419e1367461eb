# What people type. `make` alone lists it. Every target does its own set-up; none needs root.

.DEFAULT_GOAL := help
SHELL := /bin/bash
CARGO ?= cargo

# One job per core, but no more than one per 1.5 GiB of memory: the bindings to libtorch compile large C++ files.
JOBS ?= $(shell jobs=$$(nproc); room=$$(awk '/MemAvailable/ { print int($$2 / 1572864) }' /proc/meminfo); \
	[ $$room -lt 1 ] && room=1; echo $$(( jobs < room ? jobs : room )))

.PHONY: gpu-programs gpu-check help setup build demo test bench largest chaos goodput scale lint clean

help: ## Lists these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Finds libtorch 2.11.0, or installs it into ~/.cache/unisono
	@scripts/setup

build: setup ## Builds target/release/unisono and unisono-worker; STORES=1: with s3:// and gs://, minutes more
	$(CARGO) build --release --locked -j $(JOBS) -p unisono-coordinator -p unisono-worker --bins \
		$(if $(STORES),--features unisono-coordinator/stores)

demo: build ## Trains a small model on small tasks with two workers and with one, and compares
	$(CARGO_TARGET_DIR:%=%/)$(if $(CARGO_TARGET_DIR),,target/)release/unisono demo

test: setup ## Runs all tests (with cargo-nextest if it is installed)
	$(CARGO) build --workspace --bins --locked -j $(JOBS)
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		set -x; $(CARGO) nextest run --workspace --locked --build-jobs $(JOBS); \
	else \
		set -x; $(CARGO) test --workspace --locked -j $(JOBS) -- --test-threads $$(nproc); \
	fi

# For `make bench`: a model directory and GSM8K's rows, a directory with the peers' loops, and a python that runs them.
MODEL ?=
DATA ?=
PEERS ?=
PYTHON ?= python3
ROUNDS ?= 2

bench: build ## Tokens/s, memory and start-up; with MODEL, DATA, PEERS, PYTHON: beside what one would use instead
	scripts/bench.py $(MODEL) $(DATA) $(if $(PEERS),--peers $(PEERS) --python $(PYTHON)) --rounds $(ROUNDS) --out $(or $(OUT),target/bench)

# Caps of `make largest`, GiB.
CAPS ?= 4 8 16

largest: build ## The largest model that trains under caps on memory (as root): DATA=file, CAPS="4 8 16"; with PEERS, PYTHON: TRL's too
	for cap in $(CAPS); do scripts/largest_model.sh $$cap $(DATA) --python $(PYTHON) $(if $(PEERS),--trl $(PEERS)/trl_sft.py) \
		--unisono $(CARGO_TARGET_DIR:%=%/)$(if $(CARGO_TARGET_DIR),,target/)release/unisono || exit 1; done

# Kills of `make chaos`, where their places and instants come from, and where everything that was seen is kept.
KILLS ?= 300
SEED ?= 1
CHAOS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/unisono/chaos

chaos: setup ## The long tests: KILLS=300 deaths, changing worlds, partitions, hangs, 10,000 simulations; minutes
	$(CARGO) build --workspace --bins --locked -j $(JOBS)
	export UNISONO_CHAOS='$(CHAOS)' UNISONO_KILLS=$(KILLS) UNISONO_SEED=$(SEED) UNISONO_INSTANTS=100 UNISONO_SHARES=40; \
	UNISONO_STORMS=10000 $(CARGO) test -p unisono-coordinator --locked -j $(JOBS) --lib run::storm -- --nocapture && \
	$(CARGO) test -p unisono-tests --locked -j $(JOBS) --no-fail-fast --test signals --test torn --test full_disk \
		-- --test-threads 1 --nocapture && \
	$(CARGO) test -p unisono-tests --locked -j $(JOBS) --no-fail-fast -- --ignored --test-threads 1 --nocapture \
		--skip a_run_that_loses --skip checkpoints_cost; \
	ended=$$?; $(CARGO) run -q -p unisono-tests --locked --bin faults; exit $$ended

WORKERS ?= 1 10 100 1000

scale: setup ## What a step costs the coordinator with WORKERS="1 10 100 1000" workers that compute nothing
	$(CARGO) build --release --locked -j $(JOBS) -p unisono-tests --bin scale
	taskset -c $$(( $$(nproc) - 1 )) $(CARGO_TARGET_DIR:%=%/)$(if $(CARGO_TARGET_DIR),,target/)release/scale $(WORKERS)
	$(CARGO) test --locked -p unisono-coordinator --lib -- --ignored --nocapture crowd

gpu-programs: build ## Puts programs without symbols into target/gpu, to be carried to a machine with a GPU
	mkdir -p target/gpu
	for program in unisono unisono-worker; do \
		strip -o target/gpu/$$program $(CARGO_TARGET_DIR:%=%/)$(if $(CARGO_TARGET_DIR),,target/)release/$$program || exit 1; \
	done

gpu-check: ## On a machine with a GPU and torch 2.11.0: is every operation right, how fast is it; DEVICE=cpu: the same here
	python3 scripts/gpu_check.py --device $(or $(DEVICE),cuda)

# What `make goodput` trains, and for how long; without MODEL and DATA a tiny model.
MINUTES ?= 30

goodput: build ## What kills (one a minute for MINUTES=30) and checkpoints cost: MODEL=dir DATA=file SET="key=value ..."
	UNISONO_CHAOS='$(CHAOS)' UNISONO_MINUTES=$(MINUTES) $(if $(MODEL),UNISONO_MODEL='$(abspath $(MODEL))') \
	$(if $(DATA),UNISONO_DATA='$(abspath $(DATA))') $(if $(SET),UNISONO_SET='$(SET)') \
	$(CARGO) test --release -p unisono-tests --locked -j $(JOBS) --test goodput -- --ignored --test-threads 1 --nocapture

lint: setup ## Formatting, clippy, and licences with cargo-deny if it is installed
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -j $(JOBS) -- -D warnings
	@if $(CARGO) deny --version >/dev/null 2>&1; then set -x; $(CARGO) deny --locked check licenses bans sources; \
	else echo "cargo-deny is not installed: licences were not checked (cargo install cargo-deny)"; fi

clean: ## Removes what was built here; libtorch stays in the cache
	$(CARGO) clean
	rm -f .libtorch
