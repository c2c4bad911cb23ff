# Every target works in a fresh clone, with nothing but make, Python 3.11 or later and, to run Spark, Java 17 or later.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:

BIN   := $(abspath $(VENV))/bin
PY    := $(BIN)/python
STAMP := $(VENV)/.installed

# Spark starts its Python workers by name; without these they are the python3 on PATH, which has no torch.
export PYSPARK_PYTHON := $(PY)
export PYSPARK_DRIVER_PYTHON := $(PY)
# Another Spark on this machine must not lend its jars or its pyspark to this one, nor a shell with Jupyter its options.
unexport SPARK_HOME PYTHONPATH PYTHONHOME PYSPARK_DRIVER_PYTHON_OPTS

CODE := sparkdl barrier io tests $(wildcard benchmarks examples notebooks scripts)

##@ Use

.PHONY: help
help: ## Show this help
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z][a-z-]*:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\nVariables: PYTHON=python3.12 picks the interpreter of the environment, ARGS="-k plan" goes to pytest and bench.\n'

.PHONY: install
install: java $(STAMP) ## Create .venv with sparkdl and all that develops it, in the tested versions

.PHONY: demo
demo: java $(STAMP) ## Train on a DataFrame with spark-submit on four local slots
	$(BIN)/spark-submit --master 'local[4]' examples/flight_delays.py $(ARGS)

##@ Develop

.PHONY: test
test: java $(STAMP) ## Run the test suite and show the ten slowest tests
	$(PY) -m pytest -n 2 --dist loadfile --durations=10 $(ARGS)

.PHONY: test-slow
test-slow: java $(STAMP) ## Run the tests that take a minute or more
	$(PY) -m pytest -m slow --durations=10 $(ARGS)

.PHONY: faults
faults: java $(STAMP) ## Break ranks, executors, hosts, links and disks, and measure what follows
	SPARKDL_FAULTS_RESULTS=benchmarks/results $(PY) -m pytest -m faults $(ARGS)

.PHONY: lint
lint: $(STAMP) link-tree ## Check format, rules and types
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	cd .typing && $(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p sparkdl

.PHONY: format
format: $(STAMP) ## Format the code and apply the safe fixes
	$(BIN)/ruff check --fix-only $(CODE)
	$(BIN)/ruff format $(CODE)

.PHONY: bench
bench: java $(STAMP) ## Measure fit: rows per second, and what the time went into
	$(PY) benchmarks/bench_fit.py $(ARGS)

.PHONY: build
build: $(STAMP) ## Build sdist and wheel into dist/
	$(PY) -m build

.PHONY: clean
clean: ## Remove the environment, caches and all that a build or a run left
	rm -rf $(VENV) .typing .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	rm -rf spark-warehouse metastore_db derby.log artifacts
	find sparkdl barrier io tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------------------------------------------------

.PHONY: java
java:
	@scripts/java.sh

# The stamp, and not the folder, is the target: a half-made environment is made again.
$(STAMP): pyproject.toml constraints.txt
	@scripts/python.sh '$(PYTHON)'
	@echo 'Installing sparkdl and what it needs into $(VENV): some minutes, the first time.'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,connect,plot]'
	@touch $@

# mypy at the root would take io/ for the standard library's io. Here each part lies where it is imported from.
.PHONY: link-tree
link-tree:
	@rm -rf .typing && mkdir -p .typing/sparkdl
	@for part in sparkdl/*; do \
	  case $$part in */__pycache__) ;; *) ln -s "../../$$part" .typing/sparkdl/ ;; esac; \
	done
	@ln -s ../../barrier ../../io .typing/sparkdl/
