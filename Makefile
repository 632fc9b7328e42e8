# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or newer; see README.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(sort $(wildcard megalith/*.py megalith/*/*.py format/*.py converter/*.py converter/*/*.py runtime/*.py runtime/*/*.py))
ANSWER_IDS := 504, 3575, 282, 4649, 314, 7042, 30, 2

.PHONY: demo test check format browser clean FORCE

demo: $(VENV)/installed
	$(BIN)/python tools/make_demo_model.py demo/smollm2 --download-dir .cache
	$(BIN)/megalith convert demo/smollm2 demo/smollm2.lith --force
	$(BIN)/megalith verify demo/smollm2.lith --against demo/smollm2
	$(BIN)/megalith inspect demo/smollm2.lith | head -n 60
	@echo '+ megalith generate demo/smollm2.lith --chat "What is the capital of France?"'
	@$(BIN)/megalith generate demo/smollm2.lith --chat "What is the capital of France?"
	@$(BIN)/megalith generate demo/smollm2.lith --chat "What is the capital of France?" --json \
	  | $(BIN)/python -c 'import json, sys; ids = json.load(sys.stdin)["ids"]; \
	    sys.exit(f"unexpected ids {ids}" if ids != [$(ANSWER_IDS)] else print("the reference ids:", *ids))'

test: check browser
	$(BIN)/python -m pytest -n 2

# the page's tests skip themselves without a browser; CI gets one where the system's package manager has it
browser:
	@test -z "$$CI" || command -v chromium >/dev/null || ! command -v apt-get >/dev/null \
	  || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	  || echo 'no chromium: the tests of the page are skipped'

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the strict editable install links single files: install again when there are new ones
$(VENV)/installed: pyproject.toml constraints.txt $(VENV)/sources
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[dev]' --config-settings editable_mode=strict
	touch $@

$(VENV)/sources: FORCE
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@printf '%s\n' $(SOURCES) | cmp --silent - $@ || printf '%s\n' $(SOURCES) > $@

clean:
	rm -rf $(VENV) build dist demo .cache *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
