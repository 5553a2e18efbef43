# Everything runs inside .venv, which is made on first use and again when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The Hub is never needed by the demo or the tests.
export HF_HUB_OFFLINE := 1

.PHONY: help demo test identity-world lint format clean

help:
	@echo "make demo    install, then write outputs/demo.mp4 (random weights) and outputs/demo.png (a voice that follows)"
	@echo "make test    install with the test extra, then run the tests"
	@echo "make identity-world   train in the identity world and measure whether the voice follows: docs/mechanism.md"
	@echo "make lint    ruff check and format check"
	@echo "make format  let ruff rewrite what it can"

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/idlora demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

identity-world: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.identity_world

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) outputs build dist .pytest_cache .ruff_cache
