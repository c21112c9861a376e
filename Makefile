# make setup   .venv with mc-gguf in it, and the runtime built into the user's cache
# make demo    setup, then convert the bundled model and chat with it
# make test    setup, then every check and test
# PYTHON=python3.12 make setup   uses another Python (3.11 or newer)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# llama-cpp-python without its native part: its libraries come from `mc-gguf runtime build`.
PURE := CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"

.PHONY: setup demo test docs clean

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

# Threads that wait do not spin: on a machine that does other things too, spinning makes torch ten times slower.
test: setup
	$(BIN)/mc-gguf runtime build --unpatched
	$(BIN)/python -m tools.patches verify
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest --cov --cov-report=term-missing:skip-covered

docs: setup
	$(BIN)/python -m tools.make_cli_docs
	$(BIN)/python -m tools.make_calibration_docs

clean:
	rm -rf $(VENV) demo .mypy_cache .pytest_cache .ruff_cache .coverage
