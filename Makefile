# make train   a RAT model learns from real text, is evaluated and writes a sample: minutes on a laptop
# make test    lint and the whole test suite
# Each sets up what it needs in .venv first. PYTHON names another interpreter: make train PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/default
CORPUS := data/python-stdlib-bpe2048
# The suite starts dozens of processes, each of which takes some five seconds to compile the sources that it imports where
# the environment keeps Python from writing bytecode.
export PYTHONDONTWRITEBYTECODE :=
# NumPy is imported before tests/conftest.py can say so, but in workers: its threads take twice the time of one.
export OMP_NUM_THREADS ?= 1
# Compiles for TPU topologies need libtpu, which only their tests see: jax looks for TPUs where it is installed.
LIBTPU ?= .libtpu
TPU_TESTS ?= tpu

# The suite compiles quickly (tests/conftest.py); these run at XLA's default level too, which is what users compile at.
OPTIMIZED := 'tests/ops/test_rat.py::test_values_and_gradients[xla-packed]' \
  'tests/ops/test_residual_linear_attention.py::test_equals_the_loop[7-softmax-sizes2]' \
  tests/ops/test_recurrence.py::test_documents_forget_and_padding_keeps \
  tests/ops/test_gated_delta_rule.py::test_one_key_written_again_and_again_loses_no_digits \
  tests/training/test_step.py::TestTrainStep::test_loss_is_the_mean_over_targets

.PHONY: train test lint test-cpu test-optimized test-slow test-gpu test-tpu faults clean

train: $(VENV)/ready
	$(BIN)/python -m rat_jax.data.prepare --source python-stdlib --tokenizer bpe:2048 --out $(CORPUS)
	$(BIN)/python train.py --config=configs/default.py --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR)
	$(BIN)/python generate.py --workdir=$(WORKDIR) --prompt "$$(printf 'class Reader:\n    def __init__(self,')" \
	  --max_new_tokens 240 --temperature 0.6 --top_p 0.9

test: lint
	$(MAKE) --jobs=2 test-cpu test-tpu test-optimized TPU_TESTS='tpu and not slow'

test-cpu: # workers that have nothing left take tests from the other, so that both end together
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not tpu"

test-optimized:
	DEFAULT_COMPILATION=1 $(BIN)/python -m pytest $(OPTIMIZED)

lint: $(VENV)/ready-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-slow: $(VENV)/ready-for-tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not tpu and not gpu"

test-gpu: # in the environment at hand, where jax sees a GPU
	JAX_PLATFORMS=cuda $(PYTHON) -m pytest -m gpu

test-tpu: $(LIBTPU)/ready
	PYTHONPATH=$(abspath $(LIBTPU)) JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(BIN)/python -m pytest -m '$(TPU_TESTS)' \
	  tests/pallas_kernels/test_tpu_compile.py tests/training/test_dry_run.py

faults: $(VENV)/ready-for-tests # hundreds of faults, 20,000 damaged inputs: about an hour on 2 cores
	$(BIN)/python -m tests.faults
	$(BIN)/python -m tests.faults.fuzz --count 1250

clean:
	rm -rf $(VENV) $(LIBTPU)

# What is never imported need not be compiled to bytecode: half of the time of installing.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile

define new-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; name one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --upgrade-deps $(VENV) # pip of today resolves what is installed in half the time of older ones
endef

$(VENV)/ready: requirements.txt
	$(new-venv)
	$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(VENV)/ready-for-tests: requirements.txt requirements-test.txt requirements-eval.txt requirements-evidence.txt
	$(new-venv)
	$(PIP_INSTALL) -r requirements-test.txt
	@touch $@ $(VENV)/ready

$(LIBTPU)/ready: $(VENV)/ready-for-tests # the version that the installed jax names
	$(PIP_INSTALL) --no-deps --upgrade --target $(LIBTPU) "$$($(BIN)/python -c 'from importlib.metadata import requires; \
	  print(next(line.split(";")[0] for line in requires("jax") if line.startswith("libtpu")))')"
	@touch $@
