# Every target sets up what it needs on a fresh machine. PYTHON=/path/to/python uses that environment instead.
VENV := .venv
ifeq ($(origin PYTHON),undefined)
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
endif

.PHONY: build test test-all bench lint clean
build: $(ENVIRONMENT)
	@$(PYTHON) setup.py -q build_ext --inplace

$(VENV)/.installed: requirements-dev.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements-dev.txt
	touch $@

test: build
	$(PYTHON) -m pytest -q

# Every cell of the grid, every mutation of the sources.
test-all: build
	$(PYTHON) -m pytest -q --all

bench: build
	$(PYTHON) -m bench

# Formatting, and our C++ without a warning (torch's headers are not ours to judge).
lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)
	@torch=$$($(PYTHON) -c "import torch; print(torch.__path__[0])"); \
	python=$$($(PYTHON) -c "import sysconfig; print(sysconfig.get_path('include'))"); \
	for file in $(wildcard csrc/*.cpp csrc/*/*.cpp); do \
	  echo "$$file"; \
	  $(CXX) -fsyntax-only -std=c++20 -fopenmp -Wall -Wextra -Wno-psabi -Werror -DBNEXT_TORCH_VERSION=lint \
	    -isystem $$torch/include -isystem $$torch/include/torch/csrc/api/include -isystem $$python $$file || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info bnext/_C*.so
