# Two commands do everything from a bare checkout: `make demo` and `make test`. They need Python 3.11+ and make.
# Without make, see README.md: the same steps by hand, for PowerShell too.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test tests test-slow lint format clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found %d.%d. Set PYTHON=python3.12, for example." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@# Python compiles what it imports; compiling all that is installed takes half a minute more.
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## sample, train, package, serve, ask: ends in demo/report.html, in under five minutes
	$(BIN)/sscloud demo --output demo --overwrite

lint: $(STAMP) ## style, types, allowed imports, yaml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/yamllint --strict .

test: $(STAMP) ## every check, in under ten minutes
	@# At the same time: tests often wait for processes and servers of theirs.
	@$(MAKE) --no-print-directory -j 2 lint tests

tests: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal

test-slow: lint ## full sizes and long runs too
	$(BIN)/pytest -m "slow or not slow" --timeout 3600

format: $(STAMP) ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and what the demo made
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache
