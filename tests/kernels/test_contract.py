"""Every promise x op x backend x device x SIMD level x dtype; and wrong kernels, each caught by its
promise.

Under TRITON_INTERPRET=1 the Triton kernels run on CPU tensors. Where there is a GPU its backends
are judged as well, with what only a GPU can break: `-k cuda` runs these alone.
"""

import pytest
import torch
import wrong_heads
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
    numbers_and_form,
    output_form,
    passes_opcheck,
    refuses_forward_mode,
    rejects_bad_arguments,
    same_bits_twice,
    second_backward_raises,
    strides_change_no_bit,
    unmoved_by_autocast,
    unmoved_by_the_default_dtype,
)
from contract_device import (
    LARGE_PATHS,
    bad_labels_are_caught,
    memory_for,
    no_host_synchronization,
    past_two_to_the_31,
    paths_of_large_problems,
    same_bits_from_a_graph,
    same_bits_on_another_stream,
    wide_strides,
)
from contract_values import PROMISES as OF_VALUES

import kdkernels
from kdkernels.backends import OPS, backends, is_interpreted

KD = "kd_cross_entropy"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPUS = 0 if is_interpreted() else torch.cuda.device_count()
DEVICES = ["cpu", "cuda"] if GPUS else ["cpu"]
# eager is the specification itself; it is run too where the extension is hidden, and always once.
BACKENDS = [
    (op, backend, device)
    for device in DEVICES
    for op in OPS
    for backend in available_backends(op, device)
]
KERNELS = [case for case in BACKENDS if case[1] != "eager"]
ON_CUDA = [case for case in KERNELS if case[2] == "cuda"]
INTERPRETED = [case for case in KERNELS if case[1:] == ("triton", "cpu")]
COMPILED = [case for case in BACKENDS if case not in INTERPRETED]
LEVELS = [
    (*case, level)
    for case in COMPILED
    for level in (kdkernels.isa_levels() if case[1] == "native" else [""])
]
each = pytest.mark.parametrize(("op", "backend", "device"), BACKENDS)
each_compiled = pytest.mark.parametrize(("op", "backend", "device"), COMPILED)
each_level = pytest.mark.parametrize(("op", "backend", "device", "level"), LEVELS)


def at_level(level: str) -> None:
    if level:
        kdkernels.set_isa(level)


if INTERPRETED:

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("op", "backend", "device"), INTERPRETED)
    def test_numbers_and_form_in_the_interpreter(op, backend, device, dtype):
        numbers_and_form(find_op(op, device), backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_level
def test_accuracy_is_within_twice_eagers_own_error(op, backend, device, level, dtype):
    at_level(level)
    accuracy(find_op(op, device), backend, dtype)


@pytest.mark.parametrize("incoming", ["one", "expanded"])
@each
def test_accuracy_at_other_incoming_gradients(op, backend, device, incoming):
    accuracy(find_op(op, device), backend, torch.float32, incoming)


@pytest.mark.parametrize("op", OPS)
def test_the_specification_is_bitwise_independent_of_strides(op):
    strides_change_no_bit(find_op(op))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_compiled
def test_outputs_have_the_promised_form(op, backend, device, dtype):
    output_form(find_op(op, device), backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_compiled
def test_inputs_are_never_written_to(op, backend, device, dtype):
    inputs_unmodified(find_op(op, device), backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_level
def test_every_output_element_is_written(op, backend, device, level, dtype):
    at_level(level)
    every_element_written(find_op(op, device), backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_compiled
def test_two_calls_are_bitwise_identical(op, backend, device, dtype):
    same_bits_twice(find_op(op, device), backend, dtype)


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
@each
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch.*")
def test_promise(op, backend, device, promise):
    promise(find_op(op, device), backend)


@pytest.mark.parametrize(("op", "backend", "device"), KERNELS)
def test_offsets_beyond_two_to_the_31(op, backend, device):
    wide_strides(find_op(op, device), backend)


@pytest.mark.parametrize(("op", "backend", "device"), KERNELS)
def test_the_far_end_of_large_tensors(op, backend, device):
    elements = 2**31 if device == "cuda" else 2**12
    if device == "cuda" and torch.cuda.mem_get_info()[0] < memory_for(elements):
        pytest.skip(f"needs {memory_for(elements) >> 30} GiB of free GPU memory")
    past_two_to_the_31(find_op(op, device), backend, elements)


@pytest.mark.parametrize(("op", "backend", "device"), [c for c in BACKENDS if c[0] == KD])
def test_float16_soft_gradient_survives_a_loss_scale(op, backend, device):
    half_survives_loss_scale(find_op(op, device), backend)


@pytest.mark.parametrize(("op", "backend", "device"), [c for c in BACKENDS if c[0] == KD])
def test_bad_labels_are_caught(op, backend, device):
    bad_labels_are_caught(find_op(op, device), backend)


@pytest.mark.parametrize(
    ("op", "backend", "device", "promise"),
    [(*case, p) for case in BACKENDS for op, p in OF_VALUES if op == case[0]],
)
def test_promise_about_numbers_that_are_not_finite(op, backend, device, promise):
    promise(find_op(op, device), backend)


if GPUS:

    @pytest.mark.parametrize(
        "promise",
        [no_host_synchronization, same_bits_from_a_graph, same_bits_on_another_stream],
        ids=lambda f: f.__name__,
    )
    @pytest.mark.parametrize(("op", "backend", "device"), ON_CUDA)
    @pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
    def test_promise_of_a_gpu(op, backend, device, promise):
        promise(find_op(op, device), backend)

    @pytest.mark.parametrize(
        ("op", "backend", "device"), [c for c in ON_CUDA if c[0] in LARGE_PATHS]
    )
    def test_the_paths_of_large_problems(op, backend, device):
        paths_of_large_problems(find_op(op, device), backend)

    @pytest.mark.parametrize(("op", "backend", "device"), ON_CUDA)
    def test_kernels_are_the_default_on_cuda(op, backend, device):
        assert backends(op, device)[0] == backend


if GPUS > 1:

    @pytest.mark.parametrize(("op", "backend"), [c[:2] for c in ON_CUDA])
    def test_accuracy_on_a_second_gpu_cuda(op, backend):
        accuracy(find_op(op, "cuda:1"), backend, torch.float32)


@pytest.mark.parametrize("wrong", wrong_kernels.ALL + wrong_heads.ALL, ids=lambda w: w.name)
def test_a_wrong_kernel_is_rejected(wrong):
    op = find_op(wrong.op)
    wrong.promise(op)  # the right one passes
    with pytest.raises((AssertionError, RuntimeError)):
        wrong.promise(wrong.plant(op))
