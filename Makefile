# Short names for the commands that CONTRIBUTING.md explains.
PYTHON ?= python3

.PHONY: setup test test-slow kernels lint types tables bench docs

setup:            ## virtual environment with everything needed for development
	$(PYTHON) -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ".[dev,notebooks]"

test:             ## what continuous integration runs, without slow and GPU tests
	$(PYTHON) -m pytest

test-slow:        ## tests that take more than half a minute each
	$(PYTHON) -m pytest -m slow

kernels:          ## Triton kernels in the interpreter, on a CPU
	TRITON_INTERPRET=1 $(PYTHON) -m pytest tests/ops_triton

lint:             ## style and formatting
	ruff check . && ruff format --check .

types:            ## static types
	mypy

tables:           ## tables of experiments/RESULTS.md from experiments/results/*.csv
	$(PYTHON) experiments/tables.py

bench:            ## timings of the ops and of inference on this machine
	$(PYTHON) -m evocomp bench ops && $(PYTHON) -m evocomp bench inference

docs:             ## notebooks, executed
	jupytext --to ipynb --execute notebooks/*.py
