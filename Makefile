# `make demo` and `make test` set up all they need in .venv; nothing else has to be done before them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

.venv/bin/python:
	$(PYTHON) -m venv .venv

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

lint: .venv/.dev
	$(BIN)/ruff check .

clean:
	rm -rf .venv build *.egg-info
