# make serve   set up what is missing, then serve the embedded model on PORT
# make test    set up what is missing, then run the tests
PYTHON ?= python3
DEVICE ?= auto
PORT ?= 8000
ARGS ?=
PYTEST_ARGS ?=
BIN := .venv/bin

.PHONY: setup serve test test-all lint

setup:
	@$(PYTHON) scripts/setup.py --device $(DEVICE)

# ARGS takes a checkpoint and any option: make serve ARGS="./my-checkpoint --max-num-seqs 8"
serve: setup
	@exec $(BIN)/casa-serve $(ARGS) --port $(PORT)

# The console script, not `python -m pytest`, which would make the folders plugins, export
# and serving importable by their bare names.
test: setup
	@$(BIN)/pytest -m "not slow" $(PYTEST_ARGS)

test-all: setup
	@$(BIN)/pytest $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
