# The words of the house. Each makes .venv when it is missing; nothing but python3 >= 3.11 and make is needed.
#
#   make demo     the whole story on the bundled model, into demo/
#   make check    what to type after every change, under a minute on two cores: lint, types, and the fast tests of every room
#   make test     the tests, but those of `make real`: test-together, then test-alone
#   make test-together   those that may run beside others, JOBS=2 files at a time
#   make test-alone      those that measure, one by one: they carry the mark `alone`
#   make lint     ruff: rules and format
#   make types    mypy --strict
#   make bench    tests/perf: speed and memory, as ratios within one run (TABLE=docs/benchmarks.md puts the table there)
#   make gate     export nano, measure it, gate it against the target `ci`; a busy machine is said and is not red
#   make compare  is this checkout slower than BASE=HEAD~1? Both measured in lockstep; red where 10 % is proven
#   make results  docs/results.md: the score tables, written from the records under reports/
#   make baselines  docs/baselines.md: SVF beside LoRA, written from the comparisons under reports/
#   make metrics  docs/metrics.md: the metrics that are logged, written from their catalogue
#   make reference  docs/reference.md: every key of recipes, targets, task files and records, written from the code
#   make answers  tests.bench.test_known_answers.json: what the verdict's code says of known records, written from the code
#   make seeds    docs/seeds.md: every statement of the seeds with what shows it, written from docs/seeds.toml
#   make fuzz     100,000 damaged files for every reader: each is read, or refused in one line (INPUTS=1000000 for more)
#   make simulate 5000 benches and 2000 comparisons simulated beside random load, 2000 histories of real noise: how often is a verdict wrong?
#   make compare-test   40 comparisons of a commit with itself beside real load, into compare-test/
#   make duel-test   40 duels of nano with itself beside real load, and some with needless work, into duel-test/; hours
#   make load-test   200 real ones beside real load, into load-test/; needs a machine that does nothing else, and hours
#   make cluster-test   a search while 100 of its workers are killed: the same journal, no device measures twice at once
#   make fmt      let ruff mend what it can
#   make real     the tests on a real model and real data: HAVOC_REAL_MODEL (a directory or .gguf file), HAVOC_REAL_DATA
#   make gpu      the tests that need an NVIDIA card and its CUDA libraries: pip install -e ".[dev,gpu]" (docs/gpu-day.md)
#   make durations   all tests, one by one: writes the CPU seconds of each file, which choose those of `make check`
#   make mutants  change the code in one place at a time: its tests must find it; writes docs/mutants.md (MODULES="bounds.py bench/judge" MOST=80)
#   make genai    onnxruntime-genai in an environment of its own; `make test` then holds artifacts against it

PYTHON ?= python3
BIN := .venv/bin
GENAI := .venv/genai/bin/python
export HAVOC_GENAI_PYTHON ?= $(abspath $(wildcard $(GENAI)))
JOBS ?= 2
SUITE := not gpu
TOGETHER := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile -m "$(SUITE) and not alone"

.PHONY: help demo check fast test test-together test-alone durations gpu real mutants fuzz lint types bench gate compare results baselines metrics reference answers seeds simulate compare-test duel-test load-test cluster-test fmt genai
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   make/make/p' Makefile

demo: .venv/lab
	$(BIN)/havoc run --out demo

check: lint types fast

fast: .venv/dev
	$(TOGETHER) -q --fast

test: test-together test-alone

test-together: .venv/dev
	$(TOGETHER)

test-alone: .venv/dev
	$(BIN)/pytest -m "$(SUITE) and alone"

durations: .venv/dev
	$(BIN)/pytest --write-cpu-seconds

gpu: .venv/dev
	$(BIN)/pytest -m gpu tests/gpu

real: .venv/dev
	$(BIN)/pytest -m real --timeout=3600

mutants: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(if $(MOST),--most $(MOST)) $(MODULES)

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/dev
	mkdir -p .venv/typing
	ln -sfn "$(CURDIR)" .venv/typing/havoc_core
	$(BIN)/mypy

bench: .venv/dev
	$(BIN)/pytest tests/perf --benchmark-only --benchmark-columns=median,iqr,rounds $(if $(TABLE),--perf-table=$(TABLE))

gate: .venv/dev
	$(BIN)/python tests/perf/gate_nano.py

compare: .venv/dev
	$(BIN)/python tests/perf/compare_commits.py "$(or $(BASE),HEAD~1)"

results: .venv/dev
	$(BIN)/python -m havoc_core.bench.report.results reports docs/results.md

baselines: .venv/dev
	$(BIN)/python -m havoc_core.bench.report.baselines reports docs/baselines.md

metrics: .venv/dev
	$(BIN)/python -m havoc_core.track.catalogue > docs/metrics.md

reference: .venv/dev
	$(BIN)/python -m havoc_core.reference > docs/reference.md

answers: .venv/dev
	$(BIN)/python -m tests.bench.test_known_answers

seeds: .venv/dev
	$(BIN)/python -m havoc_core.seeds docs/seeds.toml > docs/seeds.md

fuzz: .venv/dev
	$(BIN)/python tests/fuzzing.py --inputs $(or $(INPUTS),100000)

simulate: .venv/dev
	$(BIN)/python tests/bench/simulated_benches.py --benches 5000
	$(BIN)/python tests/bench/simulated_pairs.py --comparisons 2000
	$(BIN)/python tests/bench/simulated_histories.py --histories 2000

compare-test: .venv/dev
	$(BIN)/python tests/perf/compares_beside_load.py --out compare-test

duel-test: .venv/dev
	$(BIN)/python tests/perf/duels_beside_load.py --out duel-test

load-test: .venv/dev
	test -d load-test/artifact || $(BIN)/havoc export nano --out load-test/artifact
	$(BIN)/python tests/perf/benches_beside_load.py load-test/artifact --out load-test

cluster-test: .venv/dev
	HAVOC_KILLS=100 $(BIN)/pytest tests/cluster/test_killed_workers.py -s --timeout=3600

fmt: .venv/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Its onnxruntime would overwrite onnxruntime-gpu in .venv.
genai: $(GENAI)

$(GENAI): | $(BIN)/pip
	@$(PYTHON) -m venv .venv/genai
	.venv/genai/bin/pip install --disable-pip-version-check "onnxruntime-genai>=0.9" || { rm -r .venv/genai; exit 1; }

# A stamp per group of dependencies; a changed pyproject.toml installs again (what fits already stays).
.venv/lab .venv/dev: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --disable-pip-version-check -e ".[$(@F)]"
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "HAVOC needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv .venv || { echo "no venv: install your system's python3-venv package"; exit 1; }
	@echo "installing HAVOC and its libraries into .venv, once"
