# One environment in .venv serves every target: what the demo needs is 98 % of its size, so a second, smaller one would only add a way to differ.
# It is made from requirements-dev.lock (hashes, no addresses): with uv if that is on the PATH, else with venv and pip. Nothing outside this folder is changed.
# A Python of your choice: make setup PYTHON=/path/to/python3.12

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu check format clean

UV := $(shell command -v uv 2>/dev/null)
RUN := .venv/bin/python -m
READY := .venv/ready

# The first Python that runs and fits; each is tried, since a version manager's shim may exist for a Python that is not active.
FITS := import sys$(if $(UV),,; import venv; import ensurepip); sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON = $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
	if $$name -c '$(FITS)' >/dev/null 2>&1; then command -v $$name; break; fi; done)

# Real pictures for the tests, where they lie beside the checkout; tests that need them skip where they are absent.
ifndef SOFTMOE_CLIP_DATA
SOFTMOE_CLIP_DATA := $(shell cd ../shared/data 2>/dev/null && pwd)
endif
ifneq ($(SOFTMOE_CLIP_DATA),)
export SOFTMOE_CLIP_DATA
endif

help:  ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*##/  \1 ##/p' Makefile | awk -F ' ## *' '{ printf "%-12s %s\n", $$1, $$2 }'

setup: $(READY)  ## make the environment in .venv (every other target does so by itself)

$(READY): requirements-dev.lock pyproject.toml
	@python="$(PYTHON)"; \
	if [ -z "$$python" ] && [ -n "$(UV)" ]; then python=3.12; fi; \
	if [ -z "$$python" ]; then \
		echo "softmoe-clip needs Python 3.11, 3.12 or 3.13 with its venv module: install one (python3.12 and python3.12-venv, say), or uv, which brings its own" >&2; \
		exit 1; \
	fi; \
	echo "making the environment in .venv with $$python $(if $(UV),and uv,and pip)"; \
	if [ -n "$(UV)" ]; then \
		uv venv --quiet --allow-existing --python "$$python" .venv && \
		uv pip sync --quiet --python .venv/bin/python --require-hashes --compile-bytecode requirements-dev.lock && \
		uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .; \
	else \
		"$$python" -m venv .venv && \
		$(RUN) pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.lock && \
		$(RUN) pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .; \
	fi
	@touch $@

demo: $(READY)  ## pack, train, evaluate, search, report: on drawn scenes, or make demo DATA=FOLDER_OR_FILE [OUT=FOLDER]
	@$(RUN) softmoe_clip demo $${DATA:+--data "$$DATA"} $${OUT:+--out "$$OUT"}

test: $(READY)  ## the fast tests, on several cores (some with make test ARGS="-k soft", on one with ARGS="-n 0")
	$(RUN) pytest -m "not slow and not gpu" -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(READY)  ## the slow tests: kills, several processes, builds, the README's commands
	$(RUN) pytest -m "slow and not gpu" $(ARGS)

test-gpu: $(READY)  ## the tests that need a GPU; all others do without one, also where there is one
	$(RUN) pytest -m gpu $(ARGS)

check: $(READY)  ## formatting, lint, import rule and all tests, as in CI
	$(RUN) ruff format --check
	$(RUN) ruff check
	.venv/bin/lint-imports
	$(MAKE) test
	$(MAKE) test-slow

format: $(READY)  ## format the code and mend what ruff can mend
	$(RUN) ruff format
	$(RUN) ruff check --fix

clean:  ## remove the environment and what tools left behind; runs and demo folders stay
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
