# Everything goes through two commands: make quickstart, make test. Both install first.
PYTHON ?= python3
BIN := .venv/bin
# More overrides for the quickstart's two runs, such as ARGS="optimizer.lr=2e-4".
WARMUP_ARGS ?=
ARGS ?=

.PHONY: install quickstart test test-slurm nightly lint docs clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megasd needs Python 3.11: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[sglang-cpu,launch,test]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$$($(BIN)/python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["sglang"][0])')"
	@touch $@

quickstart: install
	$(BIN)/python tools/make_quickstart.py runs/quickstart-start
	$(BIN)/megasd train configs/quickstart_warmup.yaml run.overwrite=true $(WARMUP_ARGS)
	$(BIN)/megasd train configs/quickstart.yaml run.overwrite=true $(ARGS)
	@echo "try next: megasd train configs/quickstart.yaml algorithm.recipe=sdpo run.dir=runs/sdpo   (plain SDPO, unweighted questions)"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documents as a site in build/site; warnings and dead links are errors.
docs: install
	$(BIN)/python -c 'import material' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --editable ".[docs]"
	$(BIN)/mkdocs build --strict

test: lint
	$(BIN)/python -m pytest

# Jobs on a real Slurm of two nodes, which is started here (as root; installed if missing) and stopped again: 13 minutes on two busy cores.
test-slurm: install
	$(BIN)/python -c 'import nemo_run' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --editable ".[launch]"
	$(BIN)/python tools/slurm_here.py run $(BIN)/python -m pytest -s --durations=0 -m slurm tests/slurm

# Every recipe, every analysis and every push end to end on real SGLang, and the slowest kernel tests: about eight minutes on two cores.
nightly: install
	$(BIN)/python -m pytest -m nightly

clean:
	rm -rf runs
