"""The cases of `python -m bench`: their targets name existing contenders, and the results that they
compare are right."""

from dataclasses import replace

import pytest
import torch

import kdkernels
from bench import worker
from bench.case import Case, Contender
from bench.cases import CASES, baselines, cases_on, find_cases, head
from bench.devices import CpuDevice
from bench.targets import FASTER, SLOWER, TARGETS, targets_of
from kdkernels.backends import OPS, isa_levels, native_missing

KD = CASES[0]
# Compiling takes half a minute: what is compiled has a test of its own, the rest is checked by
# `python -m bench` itself.
PAIRS = [(case, x) for case in CASES for x in case.contenders if not x.compiles]


def test_every_target_names_a_case_and_what_it_is_compared_with():
    for target in TARGETS:
        (case,) = [c for c in CASES if (c.op, c.name) == (target.op, target.case)]
        others = [c.name for c in case.contenders[1:]] + [f.name for f in case.floors]
        if target.kind in (FASTER, SLOWER):
            assert target.against in others, target
        else:
            assert target.against == "", target
        assert target.isa == ("" if case.device == "cuda" else case.isa or "v4"), target


def test_every_case_has_a_target_and_our_own_kernel_comes_first():
    assert len({(c.op, c.name) for c in CASES}) == len(CASES)
    for case in CASES:
        assert targets_of(case.op, case.name), case.name
        assert case.own == {"cpu": "native", "cuda": "triton"}[case.device]
        assert set(case.sizes) == set(case.quick)


def test_every_op_has_a_case():
    for device in ("cpu", "cuda"):
        covered = {case.op for case in cases_on(device)}
        for op in OPS:
            assert op in covered, f"bench has no case of {op} on {device}"


def test_the_resnet_feature_maps_have_the_size_that_the_case_states():
    (case,) = find_cases(["hidden_l2"], [])
    (gpu_case,) = find_cases(["hidden_l2"], [], "cuda")
    count = sum(n * c * side * side for n, c, side in case.sizes["shapes"]) * case.sizes["batch"]
    assert sum(n for n, _, _ in case.sizes["shapes"]) == 16
    assert round(count / 1e6) == 177
    count = sum(n * c * side * side for n, c, side in gpu_case.sizes["shapes"])
    assert sum(n for n, _, _ in gpu_case.sizes["shapes"]) == 50
    assert round(count * gpu_case.sizes["batch"] / 1e6) == 295


def test_an_unknown_op_or_case_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no op 'kd'; there are batch_triplet_loss, hidden_l2"):
        find_cases(["kd"], [])
    with pytest.raises(ValueError, match=r"no case 'x'; there are .*256x10575"):
        find_cases([], ["x"])


# What is compared


def errors_of(case: Case, contender: Contender) -> dict[str, float]:
    """The errors that the check finds at the quick sizes."""
    alone = replace(case, contenders=(contender,))
    return worker.check(alone, [contender.name], case.quick, CpuDevice())[contender.name]["errors"]


@pytest.mark.parametrize(
    ("case", "contender"), PAIRS, ids=[f"{c.op}-{c.name}-{x.name}" for c, x in PAIRS]
)
def test_every_contender_agrees_with_eager_in_float64(case, contender):
    assert case.op in OPS
    if contender.name.startswith("native") and not isa_levels():
        pytest.skip(f"needs the native kernels: {native_missing()}")
    if contender.missing():
        pytest.skip(contender.missing())
    if case.isa in isa_levels():
        kdkernels.set_isa(case.isa)
    errors = errors_of(case, contender)
    inputs = worker.make_inputs(case, contender, 0, case.quick)
    compared = len(worker.wanted_tensors(case, inputs)) * len(case.gradients)
    assert sum(name.startswith("gradient") for name in errors) == compared
    assert "result 0" in errors
    dtype = torch.bfloat16 if "bf16" in case.name else torch.float32
    assert max(errors.values()) <= worker.TOLERANCES[dtype], errors


COMPILED = {(case.op, str(case.quick)): case for case in CASES
            if any(x.compiles for x in case.contenders)}  # fmt: skip


@pytest.mark.parametrize("case", COMPILED.values(), ids=lambda c: f"{c.op}-{c.name}")
def test_a_compiled_baseline_is_the_eager_one(monkeypatch, case):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    baselines.compiled.cache_clear()
    try:
        errors = errors_of(case, case.contender("torch.compile"))
    finally:
        baselines.compiled.cache_clear()
    dtype = torch.bfloat16 if "bf16" in case.name else torch.float32
    assert max(errors.values()) <= worker.TOLERANCES[dtype], errors


def test_a_sampled_check_compares_rows_of_the_whole_result():
    (case,) = find_cases(["nearest_neighbor"], [])
    case = replace(case, check_rows=10)  # of 40 quick queries

    def wrong_at(row: int) -> Contender:
        def call(queries, gallery):
            result = kdkernels.nearest_neighbor(queries, gallery, backend="eager")
            distance = result.distance.clone()
            distance[row] += 1
            return distance, result.index

        return replace(case.contenders[0], call=call)

    assert errors_of(case, wrong_at(36))["result 0"] > 1e-2
    assert errors_of(case, wrong_at(37))["result 0"] < 1e-6
    assert errors_of(replace(case, check_rows=0), wrong_at(37))["result 0"] > 1e-2


def test_a_wrong_contender_is_found():
    torch_call = KD.contender("torch").call

    def no_temperature(student, teacher, target, *, temperature):
        return torch_call(student, teacher, target, temperature=1.0)

    def stale_scale(student, teacher, target, *, temperature):
        loss = torch_call(student, teacher, target, temperature=temperature)
        return loss.detach() + 1.001 * (loss - loss.detach())

    for call in (no_temperature, stale_scale):
        contender = replace(KD.contender("torch"), call=call)
        errors = errors_of(KD, contender)
        assert max(errors.values()) > worker.TOLERANCES[torch.float32], call.__name__


def test_an_error_outside_the_largest_elements_is_not_hidden():
    truth = torch.full((1000,), 1e-4)
    truth[0] = 1.0
    value = truth.clone()
    value[1:] *= 1.5
    assert worker.relative_error(value, truth) == pytest.approx(0.5, rel=1e-5)
    assert worker.relative_error(truth * float("nan"), truth) == float("inf")
    assert worker.relative_error(truth[:10], truth) == float("inf")


def test_the_copy_floor_writes_every_byte_once_and_half_of_them_again():
    inputs = {"student": torch.arange(10.0)}
    copied = []
    original = torch.Tensor.copy_

    def counting(self, source):
        copied.append(source.numel())
        return original(self, source)

    run = KD.floors[0].prepare(inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", counting)
        run()
    assert copied == [10, 5]


@pytest.mark.parametrize("name", ["256x10575", "256x10575-teacher"])
def test_a_truth_in_parts_is_the_whole_one(name, monkeypatch):
    monkeypatch.setattr(head, "PART", 2)
    (case,) = find_cases(["linear_kd_cross_entropy"], [name])
    inputs = worker.make_inputs(case, None, 0, case.quick)
    in_parts = worker.true_result(case, case.truth(), inputs)
    whole = worker.true_result(case, replace(case, in_parts=None).truth(), inputs)
    torch.testing.assert_close(in_parts, whole, rtol=1e-12, atol=1e-7)  # gradients: float32
