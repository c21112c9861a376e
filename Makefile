# make setup   .venv with mc-gguf in it, and the runtime built into the user's cache
# make demo    setup, then convert the bundled model and chat with it
# make check   the checks, and the tests that need no runtime: about a minute; needs no `make setup`
# make test    setup, then every check and every test
# make test-upstream    the tests of llama.cpp and llama-cpp-python with our patches
# make test-compilers   the runtime with every compiler that is installed, for other CPUs too, and its native tests
# make test-sanitizers  our native tests, mutated files and a fuzzer with address, undefined-behavior and thread sanitizers
# PYTHON=python3.12 make setup   uses another Python (3.11 or newer)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# llama-cpp-python without its native part: its libraries come from `mc-gguf runtime build`.
PURE := CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"

.PHONY: setup demo check static quick test test-upstream test-compilers test-sanitizers docs clean

setup: $(VENV)/installed
	@$(BIN)/mc-gguf runtime build

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: set PYTHON")'
	@echo "installing mc-gguf and what it needs into $(VENV): a minute or more"
	@$(PYTHON) -m venv $(VENV)
	@$(PURE) $(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--no-binary llama-cpp-python --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python -m tools.demo

# The two halves at once: on two cores this takes as long as one of them.
check: $(VENV)/installed
	@$(MAKE) --no-print-directory --jobs 2 static quick

static: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tools.patches verify
	$(BIN)/mypy

quick: $(VENV)/installed
	$(BIN)/pytest --quiet --without-runtime

# Threads that wait do not spin: on a machine that does other things too, spinning makes torch ten times slower.
test: setup static
	$(BIN)/mc-gguf runtime build --unpatched
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest --numprocesses 2 --dist loadfile --cov --cov-report=term-missing:skip-covered

test-upstream: setup
	$(BIN)/python -m tools.upstream_tests

test-compilers: $(VENV)/installed
	$(BIN)/python -m tools.compilers

test-sanitizers: setup
	$(BIN)/python -m tools.sanitizers

docs: setup
	$(BIN)/python -m tools.reference.cli
	$(BIN)/python -m tools.reference.calibration

clean:
	rm -rf $(VENV) demo .mypy_cache .pytest_cache .ruff_cache .coverage
