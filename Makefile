# make run            the whole pipeline on real images, with embedded services (SET=objective=causal_lm: on texts)
# make test           all tests
# make scenario       a night of operations with real servers, in a temporary clone
# make lint           format, style, types, import directions
# make up             servers, deployments and a worker in the background: schedules run     make down   ends them
# make sweep          many settings, several at once: FILE=name in recipes/sweeps or path
# make faults         a thousand things go wrong while language models are served; the texts stay the same
# make ui             Prefect and MLflow pages of what ran      make serve   the champion over HTTP
# Variables of run: DATASET=digits|cifar10|path/to/folder  RECIPE=name  SET="key=value key=value"  SMOKE=1 (a shrunken try)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export ORT_DISABLE_TELEMETRY := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_HOME ?= $(CURDIR)/.prefect
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run sweep scenario test lint format up down ui serve report bench bench-planner faults clean help

run: $(VENV)/.installed $(if $(findstring causal_lm,$(SET)),$(VENV)/.installed-language)
	@$(BIN)/trunkline run $(if $(DATASET),--dataset "$(DATASET)") $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(SMOKE),--smoke) $(foreach s,$(SET),--set "$(s)")

sweep: $(VENV)/.installed
	@$(BIN)/trunkline sweep "$(or $(FILE),learning_rates)"

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest --numprocesses 3 --dist loadfile

scenario: $(VENV)/.installed-test
	@$(BIN)/python tests/operations_scenario.py

lint: $(VENV)/.installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

serve: $(VENV)/.installed
	@$(BIN)/trunkline serve vision

report: $(VENV)/.installed
	@$(BIN)/trunkline report

up: $(VENV)/.installed
	@$(BIN)/trunkline up

down: $(VENV)/.installed
	@$(BIN)/trunkline down

ui: $(VENV)/.installed
	@$(BIN)/trunkline ui

bench: $(VENV)/.installed-test
	@$(BIN)/python -m benchmarks

faults: $(VENV)/.installed-test
	@$(BIN)/python -m benchmarks.lamina_faults

bench-planner: $(VENV)/.installed-test
	@$(BIN)/python -m benchmarks.planner

clean:
	rm -rf $(VENV) .cache .trunkline .prefect mlflow.db mlartifacts artifacts/data artifacts/subsets artifacts/pretrain \
	  artifacts/finetune artifacts/evaluate artifacts/export artifacts/parity artifacts/receipts artifacts/report.html \
	  artifacts/text artifacts/language_pretrain artifacts/language_evaluate artifacts/language_export

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

# pip's own message is the clearest about an index that cannot be reached; the Python version is checked by us
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-language: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[language]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[lint]'
	@touch $@
