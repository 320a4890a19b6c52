# make venv   the pinned environment and the package, in .venv
# make demo   the whole distillation chain on synthetic faces; ends in a table and runs/demo/report.html
# make test   every kind of check: ruff, pyright, pytest, once more without the extension, and the Triton
#             kernels in Triton's interpreter; two of them side by side
# make prove  the same at full width: every kernel variant compiled for every GPU, every sample in every dtype
#             and the mathematics of each op in the interpreter, the contract with KDKERNELS_ISA lowered
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv demo test prove test-suite test-gpu-code test-types test-without-native interpret-triplets interpret-rows bench format clean

venv: .venv/installed

# Rebuilt when the pins, the build or a kernel change; Python sources are used in place (editable install).
.venv/installed: requirements.txt pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	$(BIN)/python -m kdkernels
	touch $@

demo: venv
	$(BIN)/python -m kdtrain demo

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --jobs 2 --output-sync=target test-gpu-code test-suite interpret-rows interpret-triplets test-without-native test-types

prove: venv
	PROVE=1 $(MAKE) test
	for level in v3 baseline; do \
		KDKERNELS_ISA=$$level OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels || exit 1; \
	done

# Two of these run side by side, each on one core, the longest first. `pytest` alone is the first two.
test-suite:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore-glob 'tests/gpu/test_triton_*.py'

test-gpu-code:
	GPU_CODE_JOBS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu/test_triton_code.py tests/gpu/test_triton_order.py

test-types:
	$(BIN)/pyright

# eager's whole contract is in the suite; here it is the default backend.
test-without-native:
	PYTHONPATH=tests/kernels/without_native OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels/test_contract.py tests/kernels/test_import.py \
		$(wildcard tests/test_train_tiny.py tests/kdtrain/*/test_train_tiny.py) -k "not test_contract or float32"

# The interpreter runs on one core: two processes share the ops. The contract and what is Triton's own are in `make
# test`; the mathematics of each op, which the suite asks of eager and native, is in `make prove`.
INTERPRETED := tests/kernels/test_contract.py $(wildcard tests/*/test_*_triton.py) $(if $(PROVE),$(patsubst %,tests/kernels/test_%.py,\
	kd_cross_entropy linear_kd_cross_entropy head_rows hidden_l2 triplet_loss batch_triplet_loss nearest_neighbor))
INTERPRET := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(INTERPRETED)

interpret-triplets:
	$(INTERPRET) -k "triton and triplet"

interpret-rows:
	$(INTERPRET) -k "triton and not triplet"

bench: venv
	$(BIN)/python -m bench

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/*.inc

clean:
	rm -rf build .venv kdkernels.egg-info kdkernels/_build_info.py kdkernels/*.so
