# `make demo` and `make test` set up all they need in .venv; nothing else has to be done before them.
PYTHON ?= python3
BIN := .venv/bin

LATEST := .venv-latest
# Python 3.13 where it runs, unless the caller has named another.
LATEST_PYTHON = $(or $(if $(filter file,$(origin PYTHON)),$(NEWEST)),$(PYTHON))
NEWEST = $(shell python3.13 -c 'import sys; print(sys.executable)' 2>/dev/null)

.PHONY: demo test test-slow test-latest lint clean

.venv/bin/python:
	$(PYTHON) -m venv .venv

$(LATEST)/bin/python:
	$(LATEST_PYTHON) -m venv $(LATEST)

# One marker a set of extras, so that each is installed once and again when setup.py changes.
.venv/.%: setup.py | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

demo: .venv/.demo
	$(BIN)/python -m experiments.demo --workdir runs/demo

# Two processes: much of a test is XLA compiling on one core. Each needs up to 4 GB.
test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/.test
	$(BIN)/python -m pytest -m slow

# With the newest of everything, looked up each time, in an environment of its own; without torch.
test-latest: $(LATEST)/bin/python
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		--editable '.[test-without-peers]'
	$(LATEST)/bin/python -m pytest -n 2 --dist worksteal

lint: .venv/.dev
	$(BIN)/ruff check .

clean:
	rm -rf .venv $(LATEST) build *.egg-info
