# make run: environment, install, start.   make test: every test; make quick: those that need neither browser nor engine.
# make check: format, lint, types.
# make demo-model: train the bundled model anew.   make bench: how exact the measuring is, beside other clients.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test quick check demo-model bench clean

run: $(VENV)/.app
	exec $(BIN)/python app.py $(ARGS)

# Two at a time where nothing else needs the cores; then the browser and the real engines, one after the other.
test: quick
	$(BIN)/python -m pytest -m "browser or engines" $(ARGS)

quick: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not browser and not engines" $(ARGS)

demo-model: $(VENV)/.app
	$(BIN)/python -m demo_model.build $(ARGS)

bench: $(VENV)/.app
	$(BIN)/python -m benchmark $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.app: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV)
