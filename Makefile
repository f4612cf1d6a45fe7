# `make help` lists the targets. Everything runs in .venv, made from requirements.lock; nothing outside this folder is touched.
# The interpreter is always called as a module (`python -m ...`) and every path is quoted, so that the folder's name may hold spaces.

PYTHON ?= python3
run = PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python

.PHONY: help env repro spine plan test smoke lab verify weights bench pretrain readme site data-t2i-compbench data-diffusiondb
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\): .*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-26s %s\n", $$1, $$2 }'

env: .venv/stamp  ## make the environment (.venv) from requirements.lock

.venv/stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("mitune needs Python 3.11 or newer, this is %d.%d: make PYTHON=/path/to/python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@if ! [ -x .venv/bin/python ] || ! .venv/bin/python -c 'import pip'; then $(PYTHON) -m venv --clear .venv; fi
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch .venv/stamp

repro: .venv/stamp  ## run MI-TUNE end to end (dvc repro), with progress and time left; with PROFILE=full its studies widened, in profiles/full; AT_ONCE=1 for one stage at a time; PROCESSES=4 for 4 GPUs
	@$(if $(PROCESSES),MITUNE_PROCESSES=$(PROCESSES)) $(run) -m mitune.repro $(if $(PROFILE),--profile $(PROFILE)) $(if $(AT_ONCE),--at-once $(AT_ONCE))

spine: .venv/stamp  ## run the articles 00 to 03 and what they need, without the studies
	@$(run) -m mitune.repro --spine $(if $(AT_ONCE),--at-once $(AT_ONCE))

plan: .venv/stamp  ## tell what a run takes before it starts: evaluations, training, disk, memory, hours on this device; with PROFILE=paper that profile's
	@$(run) -m mitune.plan $(if $(PROFILE),--profile $(PROFILE)) $(if $(PROCESSES),--processes $(PROCESSES))

test: .venv/stamp  ## run the tests, the whole pipeline and every notebook at toy size among them
	@$(run) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

smoke: .venv/stamp  ## run the whole pipeline at toy size in a temporary clone
	@$(run) -m mitune.smoke

lab: .venv/stamp  ## open JupyterLab in notebooks/
	@$(run) -m jupyterlab notebooks

verify: .venv/stamp  ## compare the headline numbers in reports/ with the committed ones, within their intervals
	@$(run) -m mitune.verify

weights: .venv/stamp  ## download the weights of MODEL, an entry of `models` in params.yaml, into its folder, and those of its judges
	@$(run) -m mitune.weights $(MODEL)

bench: .venv/stamp  ## measure the speed of set construction; with DEVICE=cuda that of SD-2.1 and SDXL at random weights, training too, written to bench/
	@$(run) -m $(if $(DEVICE),mitune.architectures --device $(DEVICE) --write,mitune.bench)

pretrain: .venv/stamp  ## train the embedded model anew (resumes where it stopped)
	@$(run) -m mitune.pretraining

data-t2i-compbench: .venv/stamp  ## fetch the prompts of T2I-CompBench, 0.3 MB, into data/t2i-compbench
	@$(run) -m mitune.downloads t2i-compbench

data-diffusiondb: .venv/stamp  ## draw the prompts and images of DiffusionDB from the parts in data/diffusiondb
	@$(run) -m mitune.downloads diffusiondb

readme: .venv/stamp  ## refresh the generated parts of README.md
	@$(run) -m mitune.readme

site: .venv/stamp  ## write the reports as static pages that need no network, in site/
	@$(run) -m mitune.site
