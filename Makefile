PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test mutants faults docs clean

demo: $(VENV)/demo  ## run the built-in federation
	$(BIN)/fedlora demo

test: $(VENV)/dev  ## lint, format, types, tests (slow ones, docs and demo included)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

mutants: $(VENV)/dev  ## break the code on purpose, one bug at a time, and see each one caught
	$(BIN)/python tests/mutants.py
	$(BIN)/python tests/mutants_border.py
	$(BIN)/python tests/mutants_rules.py
	$(BIN)/python tests/mutants_merge.py
	$(BIN)/python tests/mutants_svd.py
	$(BIN)/python tests/mutants_faults.py
	$(BIN)/python tests/mutants_report.py
	$(BIN)/python tests/mutants_privacy.py

faults: $(VENV)/dev  ## break runs and clients for real and print the tables of docs/reliability.md
	$(BIN)/python tests/fault_table.py

docs: $(VENV)/dev  ## write the generated pages anew
	$(BIN)/python docs/generate.py

# torch first and pinned: an open range takes the newest build with gigabytes of CUDA packages
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch

$(VENV)/demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[demo,report]'
	touch $@

$(VENV)/dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
