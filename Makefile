# Everything a person or CI runs. `make demo` and `make test` set up .venv by themselves, on a machine with Python 3.11 or newer.
#
#   make demo                      explain one feature with the embedded models, into a new folder
#   make test                      the default tier: offline, CPU, a few minutes
#   make test-slow [SHARD=k]       the rest, or its shard k of $(SHARDS)
#   make lint | types              ruff; pyright strict
#   make bench                     the measured numbers of this machine
#   make gpu [DRY=1]               all GPU numbers in one go: device, gate, bench, report; DRY=1 walks the path on a CPU
#   make wheel-check               the wheel, from a clean archive, in a clean environment
#   make figures                   the README's picture, and those of docs/method.md
#   make comparison                the plot of samplers and rivals in docs/method.md
#   make kernel-table              what every Triton kernel takes on every target, into docs/kernels.md
#   make train                     how the embedded models were made (hours)
#   make architectures             a ConvNeXt beside the embedded ViT: docs/architectures.md anew (half an hour)
#   make bundle-report             measure the embedded bundle anew, and write its figures and its card

PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
SHARDS := 11
# What `make demo` explains: FEATURE=blocks.5:sae:12 make demo
FEATURE ?= blocks.5:sae:1169

# The repository root must never be on sys.path: its kernels/ would shadow a distribution that transformers looks for.
export PYTHONSAFEPATH := 1
# One environment for every target: a hub would be asked for nothing, but libraries look for one at import.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo figures comparison kernel-table test test-slow lint types bench gpu wheel-check train architectures bundle-report clean shards

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# What users get. PyPI's torch is the CPU build of constraints/ wherever the registry has one.
$(VENV)/.installed: pyproject.toml constraints/cpu.txt | $(VENV)/bin/python
	@echo 'setting up $(VENV): a few minutes, once'
	$(RUN) -m pip install --quiet --constraint constraints/cpu.txt --editable .
	@touch $@

# And what the checks need.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(RUN) -m pip install --quiet --constraint constraints/cpu.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	@$(VENV)/bin/tiltscope explain $(FEATURE) --out "tiltscope-demo-$$(date +%Y%m%d-%H%M%S)"

# The README's picture and those of docs/method.md; the same feature again continues or repeats the same folder.
figures: $(VENV)/.installed
	$(VENV)/bin/tiltscope explain $(FEATURE) --out build/four_answers
	$(RUN) tools/four_answers.py build/four_answers docs/four_answers.png
	$(RUN) tools/method_figures.py docs/figures

# Six samplers and the rivals at one activation, for docs/: a quarter of an hour.
comparison: $(VENV)/.installed
	$(VENV)/bin/tiltscope compare $(FEATURE) --num 16 --steps 25,50 --lifts dps --solvers ddpm,dpmpp_2m,dpmpp_2m_sde --out build/comparison
	cp build/comparison/compare.png docs/figures/compare.png

test: $(VENV)/.installed-dev
	$(RUN) -m pytest

test-slow: $(VENV)/.installed-dev
	$(RUN) -m pytest -m 'slow or browser' $(if $(SHARD),--shard $(SHARD)/$(SHARDS))

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.installed-dev
	$(RUN) tools/link_farm.py
	$(RUN) -m pyright --pythonpath $(RUN)

bench: $(VENV)/.installed-dev
	$(RUN) benchmarks/import_time.py
	$(VENV)/bin/tiltscope bench --out benchmarks/results/bench.jsonl
	$(RUN) benchmarks/guided_step.py

# Compiled ahead of time for six targets, without a device: some minutes.
kernel-table: $(VENV)/.installed-dev
	$(RUN) tools/kernel_table.py

# Exits 2 without a device. A cuda build of torch and triton must be in the environment: pip install '.[triton]'.
gpu: $(VENV)/.installed-dev
	$(RUN) benchmarks/gpu.py $(if $(DRY),--dry)

wheel-check: $(VENV)/.installed-dev
	$(RUN) tools/wheel_check.py

train: $(VENV)/.installed-dev
	PYTHON=$(RUN) sh tools/train_all.sh

architectures: $(VENV)/.installed-dev build/train/emoji64.npz
	PYTHON=$(RUN) sh tools/architectures.sh

# The scripts import each other, and nothing else may be found there: the root's kernels/ must stay off the path.
bundle-report: export PYTHONPATH := tools
bundle-report: $(VENV)/.installed-dev build/train/emoji64.npz
	$(RUN) tools/bundle_report.py

build/train/emoji64.npz: | $(VENV)/.installed-dev
	PYTHONPATH=tools $(RUN) tools/data.py --data build/train/packages --out $@

# How many shards the slow tier has: .ci/run asks.
shards:
	@echo $(SHARDS)

clean:
	rm -rf $(VENV) build dist
