# Every target sets up what it needs: a virtual environment in .venv with pinned packages. Set-up is skipped while
# pyproject.toml and constraints.txt are unchanged.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCK := env -u UV_INDEX -u UV_EXTRA_INDEX_URL $(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.11 \
	--default-index https://pypi.org/simple --constraint constraints.txt --generate-hashes --no-header --no-annotate

.PHONY: demo test test-slow lint docs format house reference bench-simulation bench-inference table locks clean

demo: $(READY)  ## Run the bundled federation: under five minutes on two cores.
	$(BIN)/fedtune simulate

# Files in their order: the long ones come first, and many short ones are left for whichever core is done.
test: $(READY)  ## Run the tests: under ten minutes on two cores.
	$(BIN)/pytest -m "not slow" --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-slow: $(READY)  ## Run the tests that take longer.
	$(BIN)/pytest -m slow

lint: $(READY)  ## Check style, spelling, prose and types: under a minute on two cores.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python tools/prose.py
	$(BIN)/mypy

docs: $(READY)  ## Build the documentation site into site/; broken links, anchors and stray pages are errors.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: $(READY)  ## Bring the code into its style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

house: $(READY)  ## Draw the packages and their imports into docs/architecture.md.
	$(BIN)/python tools/house.py

reference: $(READY)  ## Write docs/job-keys.md and docs/commands.md from the code.
	$(BIN)/python tools/reference.py

bench-simulation: $(READY)  ## Measure simulation against the pattern of Flower's LLM example.
	$(BIN)/python benchmarks/simulation/run.py

bench-inference: $(READY)  ## Measure exported models against transformers' generate: about ten minutes on two cores.
	$(BIN)/python benchmarks/inference/run.py

table: $(READY)  ## Measure the demo's table in docs/results.md: about ten minutes on two cores.
	$(BIN)/python benchmarks/demo/run.py

locks: $(READY)  ## Write deploy/locks again, after pyproject.toml or constraints.txt changed.
	for extra in client edge server inference; do \
		$(LOCK) --extra $$extra --output-file deploy/locks/$$extra.txt pyproject.toml || exit 1; \
	done
	sed -n 's/^requires = \["\(.*\)"\]$$/\1/p' pyproject.toml | $(LOCK) --output-file deploy/locks/build.txt -

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:  ## Remove the virtual environment and caches.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
