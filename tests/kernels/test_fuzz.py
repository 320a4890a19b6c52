"""A fixed part of the fuzz, and wrong ops that it has to reject."""

import json
from collections.abc import Callable

import fuzz
import fuzz_cases
import pytest
import torch
from wrong_kernels import EditGradient

import kdkernels

CASES = 60  # of each op in the suite; python tests/kernels/fuzz.py runs any number
UNTIL_NOTICED = 300
OFF = 3e-3


def failures(op: str, cases: range, function: Callable | None = None) -> list[str]:
    """Failing cases of an op on every backend; or of `function` in its place, on eager."""
    torch.set_num_threads(1)
    tally = fuzz.Tally(0, [op], ["eager"] if function else list(kdkernels.backends(op, "cpu")), 0)
    functions = {op: function} if function else fuzz.FUNCTIONS
    found = []
    for number in cases:
        found += tally.run(number, functions)
        if found and function:
            break
    return found


@pytest.mark.parametrize("op", fuzz_cases.OPS)
def test_random_calls_are_within_the_bound_of_their_arithmetic(op):
    assert failures(op, range(CASES)) == []


def edited(op: str, argument: str, edit: Callable) -> Callable:
    """The op with the gradient of an argument passed through `edit`."""

    def function(*, backend, **arguments):
        value = arguments[argument]
        first = value[0] if isinstance(value, list) else value
        new = EditGradient.apply(first, edit)
        arguments[argument] = [new, *value[1:]] if isinstance(value, list) else new
        return getattr(kdkernels, op)(**arguments, backend=backend)

    return function


def without_option(op: str, name: str, value: object) -> Callable:
    """The op with an option that it ignores."""

    def function(*, backend, **arguments):
        if name in arguments:
            arguments[name] = value
        return getattr(kdkernels, op)(**arguments, backend=backend)

    return function


def last_of_equal_neighbors(*, queries, gallery=None, backend):
    rows = queries if gallery is None else gallery
    if gallery is None:
        return kdkernels.nearest_neighbor(queries, backend=backend)
    found = kdkernels.nearest_neighbor(queries, rows.flip(0), backend=backend)
    return kdkernels.Nearest(found.distance, len(rows) - 1 - found.index)


def last_of_equal_rows(*, embeddings, labels, backend, **options):
    loss = kdkernels.batch_triplet_loss(
        embeddings.flip(0), labels.flip(0), backend=backend, **options
    )
    return loss.flip(0) if loss.dim() else loss


def active_at_zero(*, anchor, positive, negative, backend, **options):
    loss = kdkernels.triplet_loss(anchor, positive, negative, backend=backend, **options)
    options["margin"] += 1e-5 * (options["margin"] != 0.4)
    other = kdkernels.triplet_loss(anchor, positive, negative, backend=backend, **options)
    return other + (loss - other).detach()


def loss_rounded(*, student, teacher, target, backend, **options):
    options["return_terms"] = False
    loss = kdkernels.kd_cross_entropy(student, teacher, target, backend=backend, **options)
    return loss + (loss.bfloat16().to(loss.dtype) - loss).detach()


def writes_its_input(*, students, teachers, backend, **options):
    teachers[0].nan_to_num_(0.0).clamp_(-0.5, 0.5)
    return kdkernels.hidden_l2(students, teachers, backend=backend, **options)


WRONG: list[tuple[str, str, Callable]] = [
    *(
        (op, f"gradient of {name} off by {OFF}", edited(op, name, lambda g: g * (1 + OFF)))
        for op, name in (
            ("kd_cross_entropy", "student"),
            ("linear_kd_cross_entropy", "features"),
            ("linear_kd_cross_entropy", "weight"),
            ("triplet_loss", "positive"),
            ("batch_triplet_loss", "embeddings"),
            ("hidden_l2", "students"),
        )
    ),
    (
        "kd_cross_entropy",
        "ignored rows count",
        without_option("kd_cross_entropy", "ignore_index", -7),
    ),
    ("kd_cross_entropy", "no tau^2", without_option("kd_cross_entropy", "tau_squared", False)),
    ("kd_cross_entropy", "loss of 8 bits", loss_rounded),
    (
        "linear_kd_cross_entropy",
        "straight through",
        without_option("linear_kd_cross_entropy", "margin_grad", "straight_through"),
    ),
    ("triplet_loss", "a hinge of exactly 0 has a gradient", active_at_zero),
    ("triplet_loss", "always squared", without_option("triplet_loss", "squared", True)),
    ("batch_triplet_loss", "ties go to the last row", last_of_equal_rows),
    ("hidden_l2", "mean for batchmean", without_option("hidden_l2", "reduction", "mean")),
    ("hidden_l2", "writes its input", writes_its_input),
    ("nearest_neighbor", "ties go to the last row", last_of_equal_neighbors),
]


@pytest.mark.parametrize(
    ("op", "mistake", "function"), WRONG, ids=[f"{w[0]}: {w[1]}" for w in WRONG]
)
def test_a_wrong_op_is_noticed(op, mistake, function):
    assert failures(op, range(UNTIL_NOTICED), function), mistake


def test_a_case_is_made_from_its_number_alone():
    for op in fuzz_cases.OPS:
        first, again = (fuzz_cases.draw(op, 5, 17) for _ in range(2))
        assert first.options == again.options
        for name, value in first.tensors.items():
            assert torch.equal(value.nan_to_num(), again.tensors[name].nan_to_num())
            assert value.stride() == again.tensors[name].stride()


def test_a_tally_continues_where_it_ended(tmp_path, capsys):
    paths = tmp_path / "parts.json", tmp_path / "whole.json"
    for path, cases in ((paths[0], 7), (paths[0], 5), (paths[1], 12)):
        assert fuzz.main(["--cases", str(cases), "--tally", str(path)]) == 0
    parts, whole = (json.loads(path.read_text()) for path in paths)
    assert parts["next"] == whole["next"] == 12
    assert parts["counts"] == whole["counts"]
    assert "per second" in capsys.readouterr().out
