# `make help` lists the targets. Everything runs in .venv, made from requirements.lock; nothing outside this folder is touched.
# The interpreter is always called as a module (`python -m ...`) and every path is quoted, so that the folder's name may hold spaces.

PYTHON ?= python3
run = PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python

.PHONY: help env repro spine test smoke lab verify bench pretrain readme site
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\): .*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

env: .venv/stamp  ## make the environment (.venv) from requirements.lock

.venv/stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("mitune needs Python 3.11 or newer, this is %d.%d: make PYTHON=/path/to/python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@if ! [ -x .venv/bin/python ] || ! .venv/bin/python -c 'import pip'; then $(PYTHON) -m venv --clear .venv; fi
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch .venv/stamp

repro: .venv/stamp  ## run MI-TUNE end to end (dvc repro), with progress and time left; with PROFILE=full its studies widened, in profiles/full
	@$(run) -m mitune.repro $(if $(PROFILE),--profile $(PROFILE))

spine: .venv/stamp  ## run the articles 00 to 03 and what they need, without the studies
	@$(run) -m mitune.repro --spine

test: .venv/stamp  ## run the tests, the whole pipeline and every notebook at toy size among them
	@$(run) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

smoke: .venv/stamp  ## run the whole pipeline at toy size in a temporary clone
	@$(run) -m mitune.smoke

lab: .venv/stamp  ## open JupyterLab in notebooks/
	@$(run) -m jupyterlab notebooks

verify: .venv/stamp  ## compare the headline numbers in reports/ with the committed ones, within their intervals
	@$(run) -m mitune.verify

bench: .venv/stamp  ## measure the speed of set construction
	@$(run) -m mitune.bench

pretrain: .venv/stamp  ## train the embedded model anew (resumes where it stopped)
	@$(run) -m mitune.pretraining

readme: .venv/stamp  ## refresh the generated parts of README.md
	@$(run) -m mitune.readme

site: .venv/stamp  ## write the reports as static pages that need no network, in site/
	@$(run) -m mitune.site
