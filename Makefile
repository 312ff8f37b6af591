# make demo   Python functions run on a real Celery and a real RQ worker and come back into asyncio code
# make test   the linters, the type checker, and every test this machine can run
#
# Both set up .venv first, which takes half a minute once. PYTHON names another interpreter, PYTEST_ARGS is
# handed to pytest: make test PYTHON=python3.12 PYTEST_ARGS="tests/unit -x"

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
# Quiet twice: errors are shown, and warnings about somebody's own pip configuration are not ours.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TYPECHECK := build/typecheck
PYTEST_ARGS ?=
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)

.DEFAULT_GOAL := help
.PHONY: help demo test lint types pytest matrix chaos kills fuzz bench bench-quick format clean

help: ## what can be made
	@awk -F ' ## ' '/^[a-z-]+:.* ## / { sub(/:.*/, "", $$1); printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## run work on a Celery and an RQ worker, started for the occasion
	@$(BIN)/wove demo

# One after the other, cheapest first, so that the first failure is the last thing on the screen.
test: $(VENV)/.test ## everything: linters, types, and the tests this machine can run
	@$(MAKE) --no-print-directory lint types pytest

lint: $(VENV)/.test ## ruff: rules and formatting
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# The wheel is what users import: adapters/ and callback_server/ have their places in the package only there.
types: $(VENV)/.test ## mypy --strict on the wheel as it would be published
	@echo "== mypy --strict, on the built wheel"
	@rm -rf $(TYPECHECK) build/lib build/bdist.*
	@$(PIP) wheel --no-deps --wheel-dir $(TYPECHECK) .
	@cd $(TYPECHECK) && ../../$(BIN)/python -m zipfile -e wove-*.whl .
	@cd $(TYPECHECK) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p wove

pytest: $(VENV)/.test ## the tests this machine can run; what is missing for the others is listed at the end
	@echo "== pytest"
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

matrix: $(VENV)/.test ## the fault matrix, row by row, with longer outages and more runs than make test has time for
	@WOVE_TEST_MATRIX=1 $(BIN)/python -m pytest tests/faults $(PYTEST_ARGS)

# CHAOS_SECONDS=600 CHAOS_SEED=7 CHAOS_RUNS=10000 CHAOS_REPORT=chaos.json make chaos
chaos: $(VENV)/.test ## thousands of runs while workers, brokers and the network fail: CHAOS_SECONDS (60), CHAOS_SEED
	@PYTHONPATH=tests/support $(BIN)/python -m wove_tests.chaos

# KILLS=20 CHAOS_SEED=7 HEALTHY_SECONDS=600 make kills
kills: $(VENV)/.test ## how soon a caller learns that its worker was killed: KILLS (20), CHAOS_SEED, HEALTHY_SECONDS
	@PYTHONPATH=tests/support $(BIN)/python -m wove_tests.chaos.kills

# FUZZ_EXAMPLES=20000 FUZZ_REQUESTS=10000 FUZZ_SEED=7 make fuzz
fuzz: $(VENV)/.test ## made-up bytes for every decoder and the listener, for minutes: FUZZ_EXAMPLES, FUZZ_REQUESTS, FUZZ_SEED
	@FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-5000} FUZZ_REQUESTS=$${FUZZ_REQUESTS:-10000} FUZZ_FRAMES=$${FUZZ_FRAMES:-100000} \
	  $(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS)

# BENCH_ARGS="--only celery --rounds 9" make bench
bench: $(VENV)/.test ## Wove beside raw Celery, raw RQ and Wove 2.0.3: some ten minutes, writes benchmarks/RESULTS.md and the plot
	@$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

bench-quick: $(VENV)/.test ## the same with fewer calls, under two minutes; writes into build/bench
	@$(BIN)/python benchmarks/bench.py --scale quick $(BENCH_ARGS)

format: $(VENV)/.test ## let ruff mend and format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say which extras .venv has for this pyproject.toml; `test` brings what `demo` needs.
$(VENV)/.demo: pyproject.toml | $(BIN)/pip
	@if [ $(VENV)/.test -nt pyproject.toml ]; then exit 0; fi; \
	  echo "Installing Wove, Celery, RQ and a Redis server into $(VENV)"; \
	  $(PIP) install -e '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/pip
	@echo "Installing Wove and what its tests need into $(VENV)"
	@$(PIP) install -e '.[test]'
	@touch $@

# Without PYTHON, the first interpreter on PATH that is new enough. A half-made .venv would pass for a made
# one the next time, so it does not stay.
$(BIN)/pip:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version) ($$python)"; \
	    "$$python" -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "$$python makes no virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "Wove needs Python 3.11 or newer, and none of these is: $(PYTHONS). Name one:" >&2; \
	echo "  make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.12" >&2; \
	exit 1
