# Every target sets up what it needs on a fresh machine. PYTHON=/path/to/python uses that environment instead.
VENV := .venv
ifeq ($(origin PYTHON),undefined)
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
endif

.PHONY: build test test-all sanitize bench gpu-check gpu-check-fused lint clean
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

# The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: build
	$(PYTHON) -m pytest -q --sanitize tests/test_sanitize.py

bench: build
	$(PYTHON) -m bench
	$(PYTHON) -m bench train

# Builds, tests and measures on the NVIDIA GPU at hand, in less than eight minutes; reports into OUT.
gpu-check: $(ENVIRONMENT)
	$(PYTHON) -m bench.gpu_check --out $(or $(OUT),gpu-report)

# Times batch norm with sum and ReLU there, beside eager torch and torch.compile, in less than eight minutes too.
gpu-check-fused: $(ENVIRONMENT)
	$(PYTHON) -m bench.gpu_check --fused --out $(or $(OUT),gpu-report-fused)

# Formatting, and our C++ without a warning (torch's headers are not ours to judge), as C++17: torch 2.11's default.
lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.* tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.c*)
	@torch=$$($(PYTHON) -c "import torch; print(torch.__path__[0])"); \
	python=$$($(PYTHON) -c "import sysconfig; print(sysconfig.get_path('include'))"); \
	cuda=$$(PYTHONPATH=tests $(PYTHON) -c "from cuda_on_cpu import build; print(build.toolkit_headers() or '')"); \
	for file in $(wildcard csrc/*.cpp csrc/*/*.cpp); do \
	  case "$$cuda $$file" in " csrc/cuda/"*) echo "$$file: left out, there is no CUDA toolkit"; continue;; esac; \
	  echo "$$file"; \
	  $(CXX) -fsyntax-only -std=c++17 -fopenmp -Wall -Wextra -Wno-psabi -Werror \
	    -isystem $$torch/include -isystem $$torch/include/torch/csrc/api/include -isystem $$python \
	    $${cuda:+-isystem $$cuda} $$file || exit 1; \
	done

clean:
	rm -rf build dist *.egg-info bnext/_C*.so bnext/_build.py
