# make demo: set up, then pre-train and probe a small model on embedded data (minutes, two CPU cores)
# make test: set up, lint, build the site, run the tests (CI)      make test-all: the slow ones too
# make test-gpu: a GPU against the CPU      make test-faults: kills, full disks, flipped bits, hangs (docs/reliability.md)
# make coverage: which lines the tests run      make audit: known holes in the dependencies
# make docs: the pages as a site, links checked
# make slurm-deps: install SLURM (as root), so that the tests of jobs run too
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# The versions to install: those that the tests last passed with. Empty (make LOCK=) takes the newest.
LOCK   ?= requirements/lock.txt
# Modules are compiled when they are first imported: a fifth of those installed ever are.
INSTALL = $(BIN)/pip install --no-compile --quiet --disable-pip-version-check $(LOCK:%=--constraint %)
export PYTHONUNBUFFERED = 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-gpu test-faults coverage audit docs slurm-deps lint format tensorboard clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'mae-et needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: setup.cfg pyproject.toml $(LOCK) | $(BIN)/python
	$(INSTALL) -e .
	touch $@

# At once, for pip resolves all versions anew each time.
$(VENV)/.ready-dev: setup.cfg pyproject.toml $(LOCK) | $(BIN)/python
	$(INSTALL) -e '.[dev,docs]'
	touch $(VENV)/.ready $@

demo: $(VENV)/.ready
	$(BIN)/mae-et demo

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell mae_et finetune slurm tests benchmarks configs docs examples hubconf.py README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A file each at a time, the longest first (conftest.py). On two cores three workers, for the first one
# mostly waits for SLURM. GPUs are hidden, so that `device: auto` is the same everywhere.
PYTEST = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

test: lint docs
	$(PYTEST) -m 'not slow and not faults and not gpu'

test-all: lint
	$(PYTEST) -m 'not faults and not gpu'

# The GPU against the CPU: values, crops, decoding, compilation, runs. Where there is no GPU they skip;
# GPU_DEVICE=cpu runs their bodies on the CPU.
GPU_DEVICE = cuda
test-gpu: $(VENV)/.ready-dev
	$(BIN)/pytest -rfEs --gpu-device $(GPU_DEVICE) tests/gpu

# The same tests with the oldest versions that setup.cfg allows, in an environment of their own.
test-lowest:
	$(MAKE) VENV=.venv-lowest LOCK=requirements/lowest.txt .venv-lowest/.ready-dev
	$(PYTEST:$(BIN)%=.venv-lowest/bin%) -m 'not slow and not faults and not gpu'

lock: setup.cfg
	$(MAKE) VENV=build/lock LOCK= build/lock/.ready-dev
	{ sed '/^[^#]/,$$d' requirements/lock.txt; \
	  build/lock/bin/pip freeze --exclude-editable | grep -vE '^(nvidia|cuda|triton)'; } > build/lock.txt
	mv build/lock.txt requirements/lock.txt

# Everything that can go wrong is made to go wrong (docs/reliability.md); bounded, see FAULT_LIMIT.
FAULT_LIMIT = 30m
test-faults: $(VENV)/.ready-dev
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 timeout $(FAULT_LIMIT) $(BIN)/pytest -n 2 --dist loadfile -rfEs tests/robustness/faults

# Of the tests that CI runs, with what they start: jobs, ranks and loader processes.
coverage: $(VENV)/.ready-dev
	rm -rf .coverage && mkdir .coverage
	$(PYTEST) -m 'not slow and not faults and not gpu' --cov --cov-config=setup.cfg --cov-report=term-missing:skip-covered \
	  --cov-report=json:.coverage/report.json
	$(BIN)/python tests/untested.py .coverage/report.json

audit: $(VENV)/.ready-dev
	$(INSTALL) -e '.[audit]'
	$(BIN)/pip-audit --skip-editable

# The pages as a site, build/site/index.html; a broken link fails. Reading it needs no network.
PAGES = README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md LICENSE CITATION.cff docs benchmarks/*.md benchmarks/*.png
LINKED = setup.cfg requirements examples configs mae_et/pretraining.py
docs: $(VENV)/.ready-dev
	rm -rf build/pages && mkdir -p build/pages
	cp -r --parents $(PAGES) $(LINKED) build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# What the tests of jobs need: a SLURM of Debian's, which starts nothing by itself. Without it they skip.
SLURM_PACKAGES = slurm-wlm munge
slurm-deps:
	@if command -v sbatch >/dev/null; then \
	  echo 'SLURM is here already'; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -q -y --no-install-recommends $(SLURM_PACKAGES); \
	else \
	  echo 'as root, on Debian or Ubuntu: apt-get install $(SLURM_PACKAGES)' >&2; exit 2; \
	fi

tensorboard: $(VENV)/.ready
	$(BIN)/tensorboard --logdir runs --host 127.0.0.1

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
