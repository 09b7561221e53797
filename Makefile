# Every target sets up .venv by itself, pinned by constraints.txt. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test test-triton static lint sanitize bench bench-compare gpu clean

demo: .venv/demo
	$(BIN)/python examples/train_arithmetic.py $(ARGS)

test: .venv/test
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

# The Triton kernels without a GPU: the same suite in Triton's interpreter, and what a compiler makes of them.
test-triton: .venv/test
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses auto $(ARGS)

static: .venv/test
	$(BIN)/python -m benchmarks.static_gate $(ARGS)

# Everything a GPU has to show, in less than 9 minutes, with the Python on PATH and without a network: the suite, speed
# against peers, memory checks. Writes benchmarks/results/gpu-<name>.json and .log.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The kernel tests on an extension built with address and undefined-behaviour sanitizers.
sanitize: .venv/test
	PYTHON=$(CURDIR)/$(BIN)/python tests/sanitize.sh

bench: .venv/bench
	$(BIN)/python -m pytest benchmarks $(ARGS)

# make bench-compare BASE=<commit>: this tree against another commit, interleaved; fails beyond the noise.
bench-compare: .venv/bench
	$(BIN)/python -m benchmarks.compare $(BASE)

.venv/base: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch setuptools pybind11 ninja
	$(PIP) --no-build-isolation --editable .
	touch $@

.venv/test .venv/bench .venv/demo: .venv/%: .venv/base
	$(PIP) --no-build-isolation --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info gspo_kernels/*.so
