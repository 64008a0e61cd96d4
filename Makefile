# `make` alone lists the targets. Everything runs in .venv, which `make setup` makes once.
PYTHON := python3
PY := .venv/bin/python
ARGS :=
OUT := runs
STEP := 4
SEEDS := 1 2 3 4 5
RUNS = $(OUT)/*
A := 3
B := 4
FOUR := step1_setup.py step2_skeleton.py step3_bn_gap.py step4_aug_lr.py
# 2 means step2_skeleton.py, even with a copy beside it; 2_mine means step2_mine.py.
number = $(patsubst step%,%,$(1:%.py=%))
name = $(firstword $(filter step$(number)_%,$(FOUR)) step$(number).py)
script = $(if $(wildcard $(name)),$(name),$(error There is no $(name)))
# Copies can be run too. All are phony: never up to date, and never deleted on Ctrl-C.
STEPS := $(sort step1 step2 step3 step4 $(filter step%,$(MAKECMDGOALS)))
CHECKED := $(foreach step,$(filter step%,$(MAKECMDGOALS)),$(call script,$(step)))  # before setup
VALIDATION = $(if $(filter --validate,$(ARGS)),-validation)
PAIR = $(call script,$(A)) $(call script,$(B))
WITHOUT_DOCSTRING := 'NR == 1 && /^"""/ { head = !/""".*"""/; next } head { head = !/"""/; next } 1'
usable = "$(1)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	{ echo "$(1) is missing or older than Python 3.10. $(2)" >&2; exit 1; }
version = "$(1)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
# Where Python was upgraded in place, the packages are still in the old one's folder: reinstall.
HAS_PACKAGES := -c 'import os, sysconfig; os.listdir(sysconfig.get_path("purelib"))' 2>/dev/null
# uv makes a .venv without pip. What pip sees in PYTHONPATH would be missing in .venv: so -I.
INSTALL := { $(PY) -I -m pip --version || $(PY) -I -m ensurepip; } >/dev/null 2>&1; \
	PIP_USER=0 $(PY) -I -m pip install --disable-pip-version-check
.NOTPARALLEL:  # two trainings at once would only slow each other down
.PHONY: help setup data all smoke seeds diff digit graphs test lint bench verify results $(STEPS)
.PHONY: clean
help: ## List the targets
	@echo 'Usage: make TARGET [ARGS="--epochs 1 --seed 2"]. A copy: make step2_mine'
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' Makefile
setup: ## Make .venv with PYTHON=python3, unless it is there; install requirements.txt once
	@test -e .venv -o -h .venv || { $(call usable,$(PYTHON),Try: make setup PYTHON=python3.12); \
		"$(PYTHON)" -m venv .venv; }
	@$(call usable,$(PY),Remove .venv and run make setup.)
	@test "$(origin PYTHON)" != "command line" || { \
		was=$$($(call version,$(PY))); test "$$was" = "$$($(call version,$(PYTHON)))" || \
		echo ".venv is kept: it has Python $$was, $(PYTHON) is another version or missing." \
			"For a new one: rm -r .venv, then make setup PYTHON=$(PYTHON)" >&2; }
	@{ cmp -s requirements.txt .venv/requirements.txt && $(PY) $(HAS_PACKAGES); } || \
		{ $(INSTALL) -r requirements.txt && cp -f requirements.txt .venv; }
data: setup ## Get MNIST into data/, unless it is there; the steps do so by themselves
	@$(PY) -c 'import common; common.fill_with_mnist(common.HERE / "data")'
step1: ## Train step 1: set-up (an hour or more on a CPU)
step2: ## Train step 2: a new, small architecture
step3: ## Train step 3: batch normalization, dropout, global average pooling
step4: ## Train step 4: augmentation, learning-rate schedule
$(STEPS): setup
	@$(if $(filter step1_%,$(call script,$@)),echo 'On a CPU step 1 takes an hour or more.')
	@$(PY) $(call script,$@) $(ARGS)
all: step1 step2 step3 step4 ## Train all four steps
smoke: setup ## Run one batch of every step
	@set -e; for script in $(FOUR); do $(PY) $$script --smoke $(ARGS); done
# --seed and --out come last so that they override ARGS.
seeds: setup ## Train STEP="4 4_mine" with each of SEEDS="1 2 3 4 5" into OUT=runs; compare them
	@$(foreach seed,$(SEEDS),$(foreach step,$(STEP),\
		$(PY) $(call script,$(step)) $(ARGS) --seed $(seed) --out "$(OUT)" &&)) \
		$(PY) results/report.py $(foreach step,$(STEP),\
		$(SEEDS:%="$(OUT)/$(basename $(call script,$(step)))-seed%$(VALIDATION)"))
diff: ## Show what step B=4 changes in the code of A=3; DOCS=1: in the docstrings too
	@folder=$$(mktemp -d) || exit; trap 'rm -rf "$$folder"' EXIT; for script in $(PAIR); do awk \
		$(if $(DOCS),1,$(WITHOUT_DOCSTRING)) $$script >"$$folder/$$script"; done; cd "$$folder" || exit; \
	$$(command -v git >/dev/null && echo git --no-pager diff --no-index || echo diff -u) $(PAIR) || \
		test $$? -eq 1 -o $$? -eq 141  # they differ; `| head` has read enough
digit: setup ## Ask step 4's network which digit IMAGE=photo.jpg shows
	@$(PY) results/digit.py $(if $(IMAGE),"$(IMAGE)") $(ARGS)
graphs: setup ## Draw the curves of RUNS="runs/..." (all) into the folder of the first
	@$(INSTALL) --quiet "matplotlib>=3.10" && $(PY) results/graphs.py $(RUNS)
test: setup ## Run the tests: they need neither MNIST nor the internet
	@$(PY) -m pytest $(ARGS)
lint: setup ## Check the style with ruff
	@$(INSTALL) --quiet "ruff>=0.14,<1" && $(PY) -m ruff check .
bench: data ## Measure the speed
	@$(PY) tests/bench.py $(ARGS)
verify: data ## Test the committed weights against the committed figures
	@$(PY) results/report.py --verify
results: data ## Write the tables and graphs anew from the committed runs; trains nothing
	@$(INSTALL) --quiet "matplotlib>=3.10" && $(PY) results/graphs.py && $(PY) results/report.py
clean: ## Remove caches; runs/, data/ and .venv stay
	rm -rf .pytest_cache .ruff_cache __pycache__ results/__pycache__ tests/__pycache__
