# `make` alone prints every target. The steps run in .venv, which is made on first use.

VENV := .venv
PYTHON := $(shell cat $(VENV)/interpreter 2>/dev/null || echo python3)
PY := $(VENV)/bin/python
READY := $(VENV)/requirements.installed
OUT := runs
STEP := 4
SEEDS := 1 2 3
A := 3
B := 4
# A run on other data needs no MNIST.
DATA = $(if $(findstring --data-dir,$(ARGS)),,data)
FOUR := step1_setup.py step2_skeleton.py step3_bn_gap.py step4_aug_lr.py

.DEFAULT_GOAL := help
.NOTPARALLEL:  # two trainings at once only wait for each other, and results needs its order
.PHONY: help setup data step1 step2 step3 step4 all smoke seeds test kill fuzz diff lint \
	bench verify overfitting report search fastpath variants times graphs evidence \
	scrap results clean distclean FORCE

help: ## Print this list
	@echo 'Usage: make TARGET [ARGS="--epochs 1 --seed 2"] [PYTHON=python3.12]'
	@sed -n 's/^\([a-z0-9]*\):.*## \(.*\)/  \1 \2/p' Makefile | \
		awk '{ name = $$1; $$1 = ""; printf "  %-12s%s\n", name, $$0 }'

setup: $(READY) ## Make .venv and install requirements.txt

$(READY): requirements.txt $(VENV)/interpreter
	@echo "Installing requirements.txt (see README for the size of the download) ..."
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# Made anew only where PYTHON=... asks for another interpreter than the last time.
$(VENV)/interpreter: FORCE
	@test "$$(cat $@ 2>/dev/null)" = "$(PYTHON)" || \
		{ $(PYTHON) -m venv --clear $(VENV) && echo "$(PYTHON)" > $@; }

data: $(READY) ## Get MNIST into data/MNIST/raw, where it is not there yet
	@$(PY) -c "import common as c; c.get_data('data', (c.fetch_with_torchvision, c.fetch_with_npm)); \
		[c.read_split('data', prefix) for prefix in ('train', 't10k')]"

step1: $(READY) $(DATA) ## Train step 1: set-up, 6.38M parameters
	@echo "15 epochs of step 1 take about an hour or two on a CPU; Ctrl-C keeps what is done."
	@$(PY) step1_setup.py $(ARGS)

step2: $(READY) $(DATA) ## Train step 2: skeleton, 20,750 parameters
	@$(PY) step2_skeleton.py $(ARGS)

step3: $(READY) $(DATA) ## Train step 3: batch norm, dropout, GAP, 9,078 parameters
	@$(PY) step3_bn_gap.py $(ARGS)

step4: $(READY) $(DATA) ## Train step 4: augmentation and schedule, 9,538 parameters
	@$(PY) step4_aug_lr.py $(ARGS)

all: $(READY) $(DATA) ## Train all four steps
	@echo "All four steps take about two hours on a CPU, nearly all of it for step 1."
	@set -e; for script in $(FOUR); do $(PY) $$script $(ARGS); done

smoke: $(READY) $(DATA) ## Run one batch of every step
	@set -e; for script in $(FOUR); do $(PY) $$script --smoke $(ARGS); done

seeds: $(READY) $(DATA) ## Train STEP=4 with SEEDS="1 2 3", then print mean and spread
	@set -e; for seed in $(SEEDS); do $(PY) step$(STEP)_*.py --seed $$seed --out $(OUT) $(ARGS); done
	@$(PY) results/table.py $(foreach seed,$(SEEDS),$(OUT)/step$(STEP)-seed$(seed).csv)

test: $(READY) ## Run the tests: no network, no MNIST needed
	@$(PY) -m pytest

kill: $(READY) ## Kill real runs at 50 random moments and resume each
	@$(PY) tests/kill_and_resume.py 50

fuzz: $(READY) ## Damage the data files in 500 random ways
	@$(PY) tests/fuzz_data.py 500

diff: ## Show the lesson between two steps: make diff A=3 B=4
	@git --no-pager diff --no-index --color=auto step$(A)_*.py step$(B)_*.py || test $$? -eq 1

lint: $(READY) ## Check the style with ruff
	@$(PY) -m pip install --quiet --disable-pip-version-check "ruff>=0.14,<1"
	@$(PY) -m ruff check .

bench: $(READY) data ## Measure the speed, in ratios taken side by side
	@$(PY) tests/bench.py

verify: $(READY) data ## Test the committed weights against the committed figures
	@$(PY) results/verify.py

search: $(READY) data ## Search for the recipe of step 4 on held-out data (hours)
	@$(PY) results/search.py

fastpath: $(READY) data ## Measure whether the fast path costs accuracy (about two hours)
	@$(PY) results/fastpath.py

variants: $(READY) data ## Measure what each ingredient is worth (about three hours)
	@$(PY) results/variants.py

times: $(READY) data ## Measure accuracy against training time (about half an hour)
	@$(PY) results/times.py

overfitting: $(READY) data ## Test the committed weights on training images too
	@$(PY) results/overfitting.py

report: $(READY) ## Write results/README.md from the runs in results/
	@$(PY) results/report.py

graphs: $(READY) data ## Draw the graphs of results/ with matplotlib
	@$(PY) -m pip install --quiet --disable-pip-version-check "matplotlib>=3.10,<4"
	@$(PY) results/graphs.py

evidence: $(READY) data ## Train every run behind the figures into results/ (many hours)
	@$(MAKE) --no-print-directory seeds STEP=4 SEEDS="1 2 3 4 5 6 7 8 9 10" OUT=results
	@$(MAKE) --no-print-directory seeds STEP=3 SEEDS="1 2 3 4 5" OUT=results
	@$(MAKE) --no-print-directory seeds STEP=2 SEEDS="1 2 3 4 5" OUT=results
	@$(MAKE) --no-print-directory seeds STEP=1 SEEDS="1 2" OUT=results

scrap: ## Remove all runs in the folders of results/, which would count as finished (git has them)
	rm -rf results/search/*/ results/fastpath/*/ results/variants/*/ results/times/*/

results: scrap evidence search fastpath variants times overfitting bench graphs report ## Make everything in results/ anew (a day)

clean: ## Remove caches
	rm -rf .pytest_cache .ruff_cache __pycache__ */__pycache__

distclean: clean ## Remove caches, .venv and data; runs/ and results/ stay
	rm -rf $(VENV) data
