# Two commands on a fresh machine: `make demo` and `make test`. Both install what they need first.
.DEFAULT_GOAL := help
.PHONY: help install demo test test-all gpu soak bench lint clean
PYTHON := .venv/bin/python
RUN := $(PYTHON) -m

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: .venv/installed ## make .venv and install the tested versions (5.6 GB, 2 to 5 minutes)

.venv/installed: pyproject.toml constraints.txt
	@bash .ci/install
	@touch $@

demo: install ## depth x attention on the built-in digits: nine small trainings, a table and a figure; 4 minutes
	@echo "Nine small trainings, one on each core at a time: about 4 minutes on two cores, 8 on one."
	@echo "Then a table and a figure of them, in runs/digits/report."
	@OMP_NUM_THREADS=1 $(PYTHON) train.py -m sweep=digits_depth hydra/launcher=parallel
	@$(RUN) deepvit.report runs/digits/vit --out runs/digits/report

test: install ## the tests, 5 to 9 minutes on two cores
	@OMP_NUM_THREADS=1 $(RUN) pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal

test-all: install ## the long tests too, and on a GPU if there is one
	@$(RUN) pytest -m "not gpu"
	@$(RUN) pytest -m gpu

# With another python (make gpu PYTHON=python3) nothing is installed: it needs torch, timm and hydra.
gpu: $(if $(filter .venv/bin/python,$(PYTHON)),install) ## on a GPU, under 7 minutes: its tests, the bench, a run killed and continued; into $OUT or runs/gpu
	@$(PYTHON) tests/gpu_session.py

soak: install ## 200 kills of a training run; prints how many numbers differ from a run that was never cut
	@$(RUN) tests.soak

bench: install ## speed and memory against peers
	@$(RUN) deepvit.bench all

lint: install ## ruff
	@$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lint]"
	@$(RUN) ruff check src tests train.py eval.py

clean: ## remove .venv and caches (runs/ stays)
	rm -rf .venv build *.egg-info src/*.egg-info .pytest_cache
