# make serve   set up what is missing, then serve the embedded model on PORT
# make serve-ray   the same on Ray Serve (docs/cluster.md)
# make test    set up what is missing, check style and spelling, then run the tests
# make test-unit   the quick tests alone: no engine, no server, no cluster; under a minute
# make test-newest   the tests with the newest versions that pyproject.toml allows, in an environment of its own
# make lock    write the lock files anew from the newest versions; `make test` then installs and tries them
# make test-vllm VLLM=0.32.0   the tests of model and plugin with another vLLM, in an environment of its own
PYTHON ?= python3
DEVICE ?= auto
PORT ?= 8000
ARGS ?=
PYTEST_ARGS ?=
# Two at once; each has a server, a cluster or an engine, some GiB. `make test PARALLEL=` runs one after the other.
PARALLEL ?= -n 2 --dist loadscope --no-loadscope-reorder
VLLM ?= 0.32.0
BIN := .venv/bin

# Python compiles what it imports once, whatever the shell says: each process of a server starts 20 s sooner for it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup browser serve serve-ray test test-unit test-all test-newest test-vllm lock lint

setup:
	@$(PYTHON) scripts/setup.py --device $(DEVICE)

# Chromium from Debian's packages, in which the tests open the web page.
browser:
	@$(PYTHON) scripts/setup.py --browser

# ARGS takes a checkpoint and any option: make serve ARGS="./my-checkpoint --max-num-seqs 8"
serve: setup
	@exec $(BIN)/casa-serve $(ARGS) --port $(PORT)

# ARGS takes a cluster configuration: make serve-ray ARGS=deploy/cluster.yaml
serve-ray: setup
	@exec $(BIN)/casa-serve --ray $(ARGS) --port $(PORT)

# The console script, not `python -m pytest`, which would make the folders models, plugins,
# export and serving importable by their bare names.
test: lint browser
	@$(BIN)/pytest -m "not slow" $(PARALLEL) $(PYTEST_ARGS)

# By their files, so that nothing else is even imported: collecting all tests takes half a minute.
test-unit: setup
	@$(BIN)/pytest -q $$(grep -rl --include="test_*.py" "^pytestmark = pytest.mark.unit" tests) $(PYTEST_ARGS)

test-all: setup browser
	@$(BIN)/pytest $(PYTEST_ARGS)

test-vllm:
	@$(PYTHON) scripts/setup.py --device $(DEVICE) --vllm $(VLLM) --venv .venv-vllm-$(VLLM)
	@.venv-vllm-$(VLLM)/bin/pytest -m "not slow" tests/test_private_names.py tests/core tests/vllm $(PARALLEL) $(PYTEST_ARGS)

test-newest: browser
	@$(PYTHON) scripts/setup.py --device $(DEVICE) --newest --venv .venv-newest
	@.venv-newest/bin/pytest -m "not slow" $(PARALLEL) $(PYTEST_ARGS)

lock: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PYTHON) scripts/lock.py

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/typos
	@! git grep -nE '^(<{7}|>{7}) ' 2>/dev/null || { echo "Merges were committed before they were resolved (see above)"; exit 1; }
