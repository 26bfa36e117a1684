# Two commands: `make run` starts the main job, `make test` runs every check.
#
# torch from PyPI is a CUDA build of gigabytes on Linux, so it is chosen here on purpose and installed before
# everything else. TORCH takes any arguments of pip, for example another release, or a CPU build:
#   make run TORCH="torch --index-url URL-OF-PYTORCH'S-CPU-INDEX"
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

PORT ?= 8000
.PHONY: run test lint browser clean

run: $(VENV)/.installed
	@$(BIN)/abyssal serve --port $(PORT)

test: $(VENV)/.installed-test browser lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

# the web chat is tested in a real browser; without root, install it by hand
browser:
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; }

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
