# Everything a fresh machine needs is Python 3.11+ and make: the targets build their own environment.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= cpu,test,demo,docs
DATA ?= data
WEIGHTS ?= weights
OUT ?= study-out
BIN = $(VENV)/bin

.PHONY: install test test-slow test-long lint docs wheel demo study clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not long and not gpu'

test-slow: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not gpu'

test-long: install
	$(BIN)/python -m pytest -m 'long and not gpu'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell *.md *.toml *.yml Makefile docs pipeline precompute storage student tests

# The documentation site, into site/.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Sdist and wheel, and the wheel in an environment without this checkout.
wheel: install
	tests/check_wheel.sh $(abspath $(BIN))/python

demo: install
	$(BIN)/pipeline demo --out demo-out

# Hours: the table of docs/study.md. What is finished is not run again.
study: install
	$(BIN)/python -u docs/study.py --data '$(DATA)' --weights '$(WEIGHTS)' --out '$(OUT)'

clean:
	rm -rf $(VENV) demo-out site
