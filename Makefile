# Two commands: `make run` starts the main job, `make test` runs every check.
#
# torch from PyPI is a CUDA build of gigabytes on Linux, so it is chosen here on purpose and installed before
# everything else. TORCH takes any arguments of pip, for example another release, or a CPU build:
#   make run TORCH="torch --index-url URL-OF-PYTORCH'S-CPU-INDEX"
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
KERNELS = abyssal/kernels/fast/cpu
SOURCES = pyproject.toml $(shell find $(KERNELS) -type f)

JOBS := $(shell nproc 2>/dev/null || echo 2)
PORT ?= 8000
.PHONY: run test lint browser sandboxes native sanitize neon clean

run: $(VENV)/.installed
	@$(BIN)/abyssal serve --port $(PORT)

# three at once on two cores: many tests wait for machines and processes
test: $(VENV)/.installed-test browser lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

# the web chat is tested in a real browser; without root, install it by hand
browser:
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; }

# what sandboxes need on Debian, and what their tests need besides: a static program, archives, a maker of images
sandboxes: $(VENV)/.installed-test
	@$(BIN)/abyssal sandbox install; lacking=$$?; \
	  apt-get install -y -qq --no-install-recommends busybox-static cpio mmdebstrap >/dev/null && exit $$lacking

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "abyssal needs Python 3.11 or newer: set PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.installed

# The native kernels again, after a change of the C++ sources; keeps its objects in build/native.
native: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet scikit-build-core nanobind
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable . -C build-dir=build/native
	@$(BIN)/python -c "import abyssal.kernels.fast._cpu" || { echo "the C++ sources do not compile: see build/native" >&2; exit 1; }

# The checking program under address and undefined-behaviour sanitizers.
sanitize:
	cmake -S $(KERNELS) -B build/sanitize -DABYSSAL_PYTHON=OFF -DABYSSAL_CHECK=ON -DABYSSAL_SANITIZE=ON
	cmake --build build/sanitize --parallel $(JOBS)
	UBSAN_OPTIONS=print_stacktrace=1 build/sanitize/abyssal_check

# The checking program for NEON, cross-compiled and emulated (Debian: g++-aarch64-linux-gnu qemu-user).
neon:
	cmake -S $(KERNELS) -B build/neon -DABYSSAL_PYTHON=OFF -DABYSSAL_CHECK=ON \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  -DCMAKE_EXE_LINKER_FLAGS=-static
	cmake --build build/neon --parallel $(JOBS)
	qemu-aarch64 build/neon/abyssal_check

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
