# `make demo`: from a bare clone to a streamed completion. `make setup` is idempotent; every target below needs it.
# Package indexes are yours: pip reads its own configuration and PIP_* variables; nothing here names one.

# The first interpreter that runs and has a version that the embedded server and the pins were tried with.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$python && break; done)
# torch first and exact: on most machines a bare `torch` means several gigabytes of CUDA libraries.
TORCH = torch==2.13.0
# A CUDA build of torch brings its own version of the kernel language; a CPU build brings none.
KERNEL_LANGUAGE = triton==3.6.0

HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
MODEL_REPOSITORY ?= model_repository
TESTS ?= tests
# Processes that share the tests, or the models of `make parity`; each takes some 2 GiB.
JOBS ?= 2
SOAK_MINUTES ?= 30
SOAK_RANKS ?= 1
HISTORIES ?= 20000

BIN = .venv/bin
PORTS = --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT)
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: setup demo serve test test-paper test-gpu soak bursts fuzz mutate hosts parity histories templates lint lint-deploy perf-analyzer clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make setup: found no Python 3.11 or 3.12: install one (Debian 12: apt install python3.11-venv) or say PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { echo "make setup: PYTHON=$(PYTHON) is not Python 3.11 or 3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make setup: $(PYTHON) cannot make virtual environments: apt install $$($(PYTHON) -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')" >&2; exit 1; }
	@$(PYTHON) -m nanoflow_backend.embedded.libpython
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) setuptools $(TORCH)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) $(KERNEL_LANGUAGE)
	$(PIP_INSTALL) --no-build-isolation --editable .[dev]
	$(BIN)/python -m pip check
	@touch $@

demo: setup
	$(BIN)/nanoflow demo $(PORTS)

serve: setup
	$(BIN)/nanoflow serve $(PORTS) --model-repository $(MODEL_REPOSITORY)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(JOBS) --dist worksteal $(TESTS)

# The search on published tables, whose results are in (benchmarks/paper/README.md): not part of `make test`.
test-paper: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks/paper/tests

# Where a CUDA build of torch is installed. With pytest-xdist, XDIST="-n 15 --dist worksteal" takes minutes off.
test-gpu: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu $(XDIST) tests/gpu

# The long modes of tests. Each writes its result file and fails if it found anything.
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks soak --duration-min $(SOAK_MINUTES) --tensor-parallel $(SOAK_RANKS) --output benchmarks/results/soak$(if $(filter-out 1,$(SOAK_RANKS)),_tp$(SOAK_RANKS)).json

bursts: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks bursts --output benchmarks/results/bursts.json

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks fuzz --output benchmarks/results/fuzz.json

mutate: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks mutate --output benchmarks/results/mutated_files.json

# One engine on two hosts: network namespaces, where this user may make them (root), else loopback.
hosts: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks hosts --output benchmarks/results/two_hosts.json

parity: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks parity --processes $(JOBS) --output benchmarks/results/parity.json

# The scheduler on ten times as many random histories as `make test` gives it.
histories: setup
	HISTORIES=$(HISTORIES) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/unit/scheduler/test_scheduler_histories.py

# Chat templates of yours beside transformers: make templates DIR=folder [OUTPUT=record.json] [OF="where they are from"]
templates: setup
	@test -d "$(DIR)" || { echo "make templates: expected DIR=, a folder with *.jinja or tokenizer_config.json files" >&2; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks chat-templates $(DIR) $(if $(OUTPUT),--output $(OUTPUT)) $(if $(OF),--of "$(OF)")

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Dockerfile, compose, Kubernetes and shell scripts; says which linters are missing.
lint-deploy: setup
	$(PIP_INSTALL) --no-build-isolation --editable .[deploy]
	$(BIN)/python docker/lint.py

# The real load generator (see perf_analyzer_configs/README.md).
perf-analyzer: setup
	$(BIN)/python perf_analyzer_configs/get_perf_analyzer.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
