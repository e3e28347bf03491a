# make             what there is
# make speedrun    set up, then train here, watched live
# make test        the tests that need minutes, make check the rest
#
# PYTHON names the interpreter. It is used as it is if it has everything; else .venv is made or completed, and only then is the
# network touched. Nothing here needs an activated environment. PYTHON, PRESET, GPUS and DATA are one word each, spaces and all;
# ARGS, TESTS and NB are lists of words.

PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
export YES
export PYTHONPATH := $(CURDIR)

# $(call q,TEXT): a text as one word of the shell; a ~/ in front is the home folder, as it would be without quotes
home = $(subst <start>,,$(subst <start>~/,$(HOME)/,<start>$(1)))
q = '$(subst ','\'',$(call home,$(1)))'
# $(call python,EXTRAS): the interpreter that has the project with these extras (macOS's make 3.81 knows no .SHELLFLAGS)
python = set -eu -o pipefail; py="$$($(call q,$(PYTHON)) scripts/environment.py $(1))"
# the interpreter for targets that install nothing: .venv if it is there
VENV := $(firstword $(wildcard .venv/bin/python .venv/Scripts/python.exe))
bare = $(call q,$(if $(VENV),$(VENV),$(PYTHON)))

.PHONY: help
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup:  ## install what running, testing and reading need (the rest installs what it needs when called)
	@$(call python,book dev); echo "ready: $$py"

.PHONY: speedrun
speedrun:  ## train on this machine (PRESET=… GPUS=… DATA=… ARGS="--steps 100"; YES=1 does not ask)
	@$(call python,); exec "$$py" scripts/run_speedrun.py $(if $(PRESET),--preset $(call q,$(PRESET))) $(if $(GPUS),--gpus $(call q,$(GPUS))) $(if $(DATA),--data $(call q,$(DATA))) $(ARGS)

.PHONY: test
test:  ## unit tests, tangle-check, lint and types (eight minutes on 2 cores)
	@$(call python,book dev); export PATH="$$(dirname "$$py"):$$PATH"; \
	"$$py" -m mypy & types=$$!; "$$py" scripts/tangle.py --check; \
	"$$py" -m ruff check . ; "$$py" -m ruff format --check . ; wait $$types; \
	"$$py" -m pytest -n 2 --dist loadfile $(TESTS)

.PHONY: chromium
chromium:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$name > /dev/null && exit 0; done; \
	echo "make check drives the book in Chromium, which is not installed: apt-get install chromium (macOS: brew install --cask chromium)"; exit 1

.PHONY: check
check: chromium book  ## what make test leaves out: every chapter, the book, the book in a browser, long tests
	@$(call python,book dev); export PATH="$$(dirname "$$py"):$$PATH"; \
	"$$py" -m pytest -m "(browser or chapters or slow) and not long" -n 2 --dist loadgroup $(TESTS)

.PHONY: tangle
tangle:  ## notebooks/ → speedrun/ (FORCE=1 overwrites modules that were edited by hand)
	@$(bare) scripts/tangle.py $(if $(FORCE),--force)

.PHONY: tangle-check
tangle-check:  ## fail where speedrun/ is not what the notebooks say; installs nothing
	@$(bare) scripts/tangle.py --check

.PHONY: chapter
chapter:  ## execute one chapter: make chapter NB=02
	@test -n $(call q,$(NB)) || { echo "which one? make chapter NB=02"; exit 2; }
	@$(call python,book dev); "$$py" scripts/tangle.py; "$$py" scripts/execute.py --force $(foreach word,$(NB),$(call q,$(word)))

.PHONY: book
book:  ## execute the chapters that changed and build the book: _build/site/index.html
	@$(call python,book dev); "$$py" scripts/tangle.py --check; "$$py" scripts/execute.py; "$$py" scripts/book.py

.PHONY: lab
lab:  ## the chapters as notebooks, in JupyterLab; saving one rewrites the package (NB=06 opens it)
	@$(call python,book dev); exec "$$py" scripts/lab $(foreach word,$(NB),$(call q,$(word))) -- $(ARGS)

.PHONY: exercises
exercises:  ## the same, with holes where the solutions were: exercises/*.ipynb
	@$(call python,book dev); exec "$$py" scripts/lab --exercises $(foreach word,$(NB),$(call q,$(word))) -- $(ARGS)

.PHONY: doctor
doctor:  ## what this machine can run, what is missing, and how to mend it
	@status=0; $(bare) scripts/environment.py --check book dev || status=$$?; test "$$status" -lt 2 || exit "$$status"; \
	$(bare) -m speedrun.lab.doctor || status=1; \
	if [ "$$status" = 0 ]; then $(bare) -m speedrun.launch --plan; fi; exit "$$status"

.PHONY: stale
stale:  ## results whose code has changed since (PROVE=1 tries to show that it trains the same)
	@$(call python,book dev); "$$py" scripts/stale.py $(if $(PROVE),--prove)

.PHONY: format
format:  ## format and lint what can be mended by machine
	@$(call python,book dev); "$$py" -m ruff format . ; "$$py" -m ruff check --fix . ; "$$py" scripts/tangle.py

.PHONY: clean
clean:  ## remove what can be made again (not data/, not runs/, not .venv)
	rm -rf _build .pytest_cache .ruff_cache .mypy_cache .hypothesis
