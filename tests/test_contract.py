"""Every promise x op x backend x SIMD level x dtype; and wrong kernels, each caught by its
promise."""

import pytest
import torch
import wrong_kernels
from contract import (
    accuracy,
    available_backends,
    compiles_whole,
    every_element_written,
    find_op,
    half_survives_loss_scale,
    inputs_unmodified,
    nan_in_nan_out,
    no_gradient_without_asking,
    output_form,
    passes_opcheck,
    refuses_forward_mode,
    rejects_bad_arguments,
    same_bits_twice,
    second_backward_raises,
    unmoved_by_autocast,
    unmoved_by_the_default_dtype,
    wide_strides,
)

import kdkernels
from kdkernels import library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# eager is the specification itself; it is run too where the extension is hidden, and always once.
BACKENDS = [(op, backend) for op in library.OPS for backend in available_backends(op)]
LEVELS = [
    (op, backend, level)
    for op, backend in BACKENDS
    for level in (kdkernels.isa_levels() if backend == "native" else [""])
]


def at_level(level: str) -> None:
    if level:
        kdkernels.set_isa(level)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend", "level"), LEVELS)
def test_accuracy_is_within_twice_eagers_own_error(op, backend, level, dtype):
    at_level(level)
    accuracy(find_op(op), backend, dtype)


@pytest.mark.parametrize("incoming", ["one", "expanded"])
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_accuracy_at_other_incoming_gradients(op, backend, incoming):
    accuracy(find_op(op), backend, torch.float32, incoming)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_outputs_have_the_promised_form(op, backend, dtype):
    output_form(find_op(op), backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_inputs_are_never_written_to(op, backend, dtype):
    inputs_unmodified(find_op(op), backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend", "level"), LEVELS)
def test_every_output_element_is_written(op, backend, level, dtype):
    at_level(level)
    every_element_written(find_op(op), backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_same_bits_twice(op, backend, dtype):
    same_bits_twice(find_op(op), backend, dtype)


@pytest.mark.parametrize(
    "promise",
    [
        second_backward_raises,
        nan_in_nan_out,
        passes_opcheck,
        compiles_whole,
        no_gradient_without_asking,
        unmoved_by_autocast,
        refuses_forward_mode,
        unmoved_by_the_default_dtype,
        rejects_bad_arguments,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch.*")
def test_promise(op, backend, promise):
    promise(find_op(op), backend)


@pytest.mark.parametrize("op", [op for op, backend in BACKENDS if backend == "native"])
def test_offsets_beyond_two_to_the_31(op):
    if op == "hidden_l2":
        pytest.skip("hidden_l2 takes lists: tests/test_hidden_l2.py addresses beyond 2^31")
    wide_strides(find_op(op), "native")


def test_float16_soft_gradient_survives_a_loss_scale():
    half_survives_loss_scale(find_op("kd_cross_entropy"))


@pytest.mark.parametrize("wrong", wrong_kernels.ALL, ids=lambda w: w.name)
def test_a_wrong_kernel_is_rejected(wrong):
    op = find_op(wrong.op)
    wrong.promise(op)  # the right one passes
    with pytest.raises((AssertionError, RuntimeError)):
        wrong.promise(wrong.plant(op))
