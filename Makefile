# `make` shows what can be done. Everything is made inside this checkout (.venv, .churn); remove it with `make clean`.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
SNAPSHOTS ?=
SEED ?= 0
CONTEXT ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo stop serve up down images node-build test test-quick test-load test-cluster test-faults bench audit lint format lock clean

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## Create the virtual environment in .venv, from pinned and hashed requirements

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python {v[0]}.{v[1]} found; expected 3.11 to 3.13: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@# uv installs in half a minute what takes pip three; it is pinned and hashed like the rest
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.txt > .venv/uv.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: setup ## Run the whole loop on this machine: make demo [SNAPSHOTS=folder] [SEED=n]
	$(BIN)/churn demo --seed $(SEED) $(if $(SNAPSHOTS),--snapshots "$(SNAPSHOTS)")

stop: setup ## Stop what the demo left running
	@$(BIN)/churn stop

serve: setup ## Serve what the demo left in production, until Ctrl-C
	@test -f .churn/churn.db || { echo "nothing to serve yet: make demo"; exit 1; }
	$(BIN)/churn serve

up: setup ## Install the chart on kind, minikube or a node made here, and print the curl: make up [CONTEXT=name]
	@$(BIN)/python -m tests.cluster.local up --context "$(CONTEXT)"

down: setup ## Remove what `make up` made
	@$(BIN)/python -m tests.cluster.local down --context "$(CONTEXT)"

node-build: setup ## Build the node's binaries, Helm and kubectl among them, into ~/.cache/churn (half an hour, once)
	@$(BIN)/python -m tests.cluster.node build

images: ## Build the three images: churn-jobs, churn-serving, churn-mlflow
	@images/build

test: setup ## Run all tests that need no cluster, three demos among them (17 to 20 minutes on two cores)
	$(BIN)/pytest -m "not bench and not load and not cluster"

test-quick: setup ## Run them without the demos
	$(BIN)/pytest -m "not demo and not bench and not load and not cluster"

test-load: setup ## Load the service, kill it under load, and send it what nobody should (needs redis, postgresql)
	$(BIN)/pytest tests/load

test-cluster: setup ## Run the tests of the chart, and those on a real Kubernetes node that it makes (root on Linux)
	@$(BIN)/python -m tests.cluster.local node
	$(BIN)/pytest tests/charts tests/cluster -m "not faults"

test-faults: setup ## Break a release on that node in every way while clients ask; writes tests/cluster/results/faults.json
	@$(BIN)/python -m tests.cluster.local node
	$(BIN)/pytest tests/cluster -m faults -s

bench: setup ## Measure what the commands cost, and the service against three other builds (needs wrk, redis, postgresql)
	@$(BIN)/python -W ignore -m tests.bench.commands
	@$(BIN)/python -W ignore -m tests.bench.serving

audit: setup ## Look for known vulnerabilities in what is pinned (needs PyPI's advisories)
	$(BIN)/uv tool run pip-audit --strict --disable-pip --require-hashes -r requirements.txt

lint: setup ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Put the code into the project's format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
    --no-emit-index-url --no-emit-find-links

lock: setup ## Resolve requirements.in into requirements.txt anew, and the images' parts of it
	$(COMPILE) requirements.in -o requirements.txt
	@# the whole is the constraint of the parts, so that all images agree with what was tested
	for image in jobs serving mlflow; do \
	    $(COMPILE) --constraint requirements.txt $$(ls images/$$image/overrides.txt 2>/dev/null | sed 's/^/--override /') \
	        images/$$image/requirements.in -o images/$$image/requirements.txt || exit 1; \
	done

clean: ## Remove what make created in this checkout, a demo and its data included
	@test ! -x $(BIN)/churn || $(BIN)/churn stop
	rm -rf .venv .churn .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
