# Needs Python >= 3.10 and make, nothing else. Every target makes .venv when it is missing.
PYTHON ?= python3
TORCH ?= torch==2.11.0 torchaudio==2.11.0 torchvision==0.26.0
BIN := .venv/bin
JOBS ?= 2
# Where there is a compiler, kernels that do not build or do not load are an error: of `make env`, and of the tests.
export FLEXNORM_BUILD ?= $(if $(shell command -v g++ || command -v c++),required,optional)
KERNELS := setup.py $(wildcard flexnorm/kernels/cpu/*.cpp flexnorm/kernels/cpu/*.h)

.PHONY: env demo test test-long test-fast asan wheel bench bench-plain bench-quick bench-calls claims docs docs-check lint format clean

env: .venv/ready .venv/built

# torch first and by its version: later torchaudio and torchvision wheels refuse it.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) "torch-geometric==2.8.*" "einops==0.8.*"
	FLEXNORM_BUILD=none $(BIN)/python -m pip install --quiet --editable ".[all,dev]"
	@touch $@

.venv/built: .venv/ready $(KERNELS)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: env
	$(BIN)/python examples/tour.py

test: env
	$(BIN)/python -m pytest --quiet -n $(JOBS) --dist worksteal -m "not long"

# What trains for a while: claims, and some examples.
test-long: env
	$(BIN)/python -m pytest --quiet -n $(JOBS) --dist worksteal -m long

test-fast: env
	$(BIN)/python -m pytest --quiet -n $(JOBS) -m "not slow and not long"

# The C++ kernels under AddressSanitizer and UBSan, built beside the working tree's own. Needs g++.
asan: env
	$(BIN)/python tests/asan.py -n $(JOBS)

# A wheel for every Python and torch of this system, in dist/.
wheel: env
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# Prints a table, writes benchmarks/results/*.json and draws docs/speed.svg: see docs/speed.md.
bench: env
	$(BIN)/python -m benchmarks

# A plain process against torch's operations.
bench-plain: env
	$(BIN)/python -m benchmarks --plain

bench-quick: env
	$(BIN)/python -m benchmarks --quick

# What a call costs: a table with targets, benchmarks/results/calls.json.
bench-calls: env
	$(BIN)/python -m benchmarks --calls

# Every claim of examples/claims put to the test; writes docs/claims.md.
claims: env
	$(BIN)/python examples/claims/collect.py

# The site, in site/: any warning ends it. Nothing is fetched while it is built, or read.
docs: env .venv/docs
	$(BIN)/python docs/pictures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs: .venv/ready
	FLEXNORM_BUILD=none $(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@

# The site in a headless Chromium, which must be there. SHOTS=folder keeps pictures of all pages.
docs-check: docs
	$(BIN)/python -m pip install --quiet "playwright>=1.49"
	$(BIN)/python docs/check.py $(SHOTS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-newest build dist site docs/pictures *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
