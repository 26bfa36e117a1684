# Two commands: `make run` starts the main job, `make test` runs every check.
#
# torch from PyPI is a CUDA build of gigabytes on Linux, so it is chosen here on purpose and installed before
# everything else. TORCH takes any arguments of pip, for example another release, or a CPU build:
#   make run TORCH="torch --index-url URL-OF-PYTORCH'S-CPU-INDEX"
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test lint clean

run: $(VENV)/.installed
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/abyssal chat; \
	else $(BIN)/abyssal generate --prompt "And the king said unto" --temperature 0.6 --seed 2; fi

test: $(VENV)/.installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "abyssal needs Python 3.11 or newer: set PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
