# Every target does its own set-up in .venv and may be run again at any time.
#   make demo    ask the embedded model about docs/clip.mp4        make test    run the tests
#   make lint    ruff and mypy                                     make docs    regenerate docs/cli.md
# PYTHON picks the interpreter that .venv is made from (3.11 or later).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

# PyPI's torch for Linux brings 3 GB of CUDA libraries. Where there is no NVIDIA driver, PyTorch's own index of CPU
# builds is used beside PyPI if it can be reached; TORCH_INDEX= turns that off, or names another index.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null || [ "$$(uname -s)" != Linux ] || $(PYTHON) -c \
  "import urllib.request as u; u.urlopen('$(CPU_INDEX)/', timeout=5); print('$(CPU_INDEX)')" 2>/dev/null)
EXTRA_INDEX = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test lint docs clean

demo: $(VENV)/.seats
	$(BIN)/seats ask --stats docs/clip.mp4 "what is said?"

test: $(VENV)/.seats-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.seats-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.seats
	$(BIN)/python -m seats_cli.cli.reference > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'seats needs Python 3.11 or later: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)

# The stamps say that .venv holds what these two files ask for.
$(VENV)/.seats: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing seats into $(VENV): a few minutes the first time"
	$(PIP) -c constraints.txt $(EXTRA_INDEX) -e .
	@touch $@

$(VENV)/.seats-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing seats and its development tools into $(VENV): a few minutes the first time"
	$(PIP) -c constraints.txt $(EXTRA_INDEX) -e ".[dev]"
	@touch $@ $(VENV)/.seats
