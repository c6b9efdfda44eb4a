# The project's commands. Each installs what it needs into .venv the first time, and again only after pyproject.toml or
# constraints.txt has changed. Another interpreter: make PYTHON=python3.12 demo

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n 2

EXTRAS_demo := examples
EXTRAS_test := examples,test
EXTRAS_lint := lint
EXTRAS_docs := docs
EXTRAS_bench := bench

.DEFAULT_GOAL := help
.PHONY: help demo test test-all transforms lint format docs bench clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: .venv/.demo  ## train a network with a QP layer on real photographs (about a minute)
	@$(BIN)/python examples/quickstart.py

test: .venv/.test  ## the tests, on two processes with one thread each
	@$(PYTEST)

test-all: .venv/.test  ## the slow tests too
	@$(PYTEST) -m "slow or not slow"

transforms: .venv/.test  ## print the table of transforms x problems x linear solvers
	@$(ONE_THREAD) $(BIN)/python -m tests.transforms

lint: .venv/.lint  ## formatter, linter and type checker, without changing a file
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/ty check --python .venv

format: .venv/.lint  ## format, and mend what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: .venv/.docs  ## run the gallery and build the documentation into docs/_build/html
	@$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	@$(BIN)/python docs/check_offline.py docs/_build/html
	@echo "docs/_build/html/index.html"

bench: .venv/.bench  ## ours and the peers side by side, with accuracy
	@$(ONE_THREAD) $(BIN)/python -m benchmarks

clean:  ## remove .venv and everything that was built
	rm -rf .venv build dist docs/_build docs/auto_examples docs/sg_execution_times.rst examples/figures
	rm -rf .coverage .hypothesis .pytest_cache .ruff_cache
	find difflayers tests examples benchmarks docs -name __pycache__ -prune -exec rm -rf {} +

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "difflayers needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "==> creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

# One line per package while pip works; all that it says is in .venv/pip.log, whose end is shown if it fails.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
PROGRESS := tee -a .venv/pip.log | awk '\
  /^Collecting/ { print "    " $$2; fflush() } \
  /^Processing .*whl/ { sub(".*/", ""); sub("-(cp|py)[0-9].*", ""); print "    " $$0; fflush() } \
  /^Installing coll/ { print "    unpacking ..."; fflush() }'
FAILED := { tail -n 20 .venv/pip.log; echo "==> the installation failed; .venv/pip.log has the whole story"; exit 1; }

.venv/.%: .venv/.created pyproject.toml constraints.txt
	@echo "==> installing torch-difflayers[$(EXTRAS_$*)] into .venv (the first time takes a few minutes: torch is large)"
	@set -o pipefail; $(PIP) -e ".[$(EXTRAS_$*)]" 2>&1 | $(PROGRESS) || $(FAILED)
	@if [ $* = bench ]; then set -o pipefail; $(PIP) --no-deps qpth 2>&1 | $(PROGRESS) || $(FAILED); fi
	@touch $@
