# Every target makes the environment that it needs: .venv, an editable install under constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_DEMO := .venv/.installed-demo
WORKERS := --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help
help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

# Not compiled: that takes a minute, and is done for what is imported.
INSTALL := $(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) '.[dev]'
	touch $@ $(INSTALLED_DEMO)

$(INSTALLED_DEMO): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) '.[demo]'
	touch $@

.PHONY: demo
demo: $(INSTALLED_DEMO)  ## fine-tune, score and draw; DATA=folder WEIGHTS=turbo for your own
	$(BIN)/python recipes/demo.py $(if $(DATA),'data=$(DATA)') $(if $(WEIGHTS),'weights=$(WEIGHTS)')

.PHONY: test
test: $(INSTALLED)  ## the quick tests, under 4 minutes on two cores; volumes from SAMMED3D_DATA
	$(BIN)/python -m pytest $(WORKERS)

.PHONY: test-all
test-all: test test-slow  ## the quick tests, then the slow ones

.PHONY: test-slow
test-slow: $(INSTALLED)  ## the slow tests alone: recipes end to end, packaging, kills
	$(BIN)/python -m pytest $(WORKERS) -m 'slow and not weights'

.PHONY: fuzz
fuzz: $(INSTALLED)  ## more than 5,000 malformed inputs through every door; under 15 minutes
	PYTHONPATH=tests/support $(BIN)/python -m tests.fuzz

.PHONY: kill-test
kill-test: $(INSTALLED)  ## 100 kills over every long command; under 60 minutes
	PYTHONPATH=tests/support $(BIN)/python -m tests.kills

.PHONY: licences
licences: $(INSTALLED)  ## the licence of every dependency, by extra; fails on GPL
	$(BIN)/python tests/support/licences.py

.PHONY: lowest
lowest:  ## the quick tests with the lowest versions that setup.cfg allows, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tests/support/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --constraint .venv-lowest/constraints.txt --editable '.[test]'
	# Old packages use what their own dependencies have deprecated since.
	.venv-lowest/bin/python -m pytest $(WORKERS) -W ignore::DeprecationWarning

.PHONY: check
check: $(INSTALLED)  ## lint, format, types, repeats, import directions, unused code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pylint --disable=all --enable=duplicate-code --min-similarity-lines=8 --score=no \
		sammed3d_backbone recipes/*.py
	$(BIN)/python -m pytest --quiet tests/test_architecture.py

.PHONY: bench
bench: $(INSTALLED)  ## time and memory of the encoder and UNETR against the reference
	$(BIN)/python recipes/benchmarks/encoder_speed.py

.PHONY: golden
golden: $(INSTALLED)  ## the reference's outputs for `sammed3d selftest` anew, and how they differ
	$(BIN)/python recipes/benchmarks/golden.py
