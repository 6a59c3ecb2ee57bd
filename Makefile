# Every target sets up what it needs on a fresh machine. PYTHON=/path/to/python uses that environment instead.
VENV := .venv
ifeq ($(origin PYTHON),undefined)
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.installed
endif

.PHONY: build test test-all bench lint clean
build: $(ENVIRONMENT)
	$(PYTHON) setup.py -q build_ext --inplace

$(VENV)/.installed: requirements-dev.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements-dev.txt
	touch $@

test: build
	$(PYTHON) -m pytest -q

bench: build
	$(PYTHON) -m bench layers
	$(PYTHON) -m bench train

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m clang_format --dry-run -Werror $$(git ls-files 'csrc/*')

clean:
	rm -rf build dist *.egg-info bnext/_C*.so
