"""Calls on tensors without values, and exported programs that are saved and loaded."""

import io
from dataclasses import replace

import pytest
import torch
import torch.utils._pytree as pytree
from contract import Op, available_backends, find_op, flatten, run, size_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import kdkernels
from kdkernels.backends import OPS
from kdkernels.sample import Sample

BACKENDS = [(op, backend) for op in OPS for backend in available_backends(op)]


def form(tensors: list[Tensor]) -> list[tuple]:
    return [(t.shape, t.dtype) for t in tensors]


def calls(op: Op) -> list[Sample]:
    """The smallest sample of each combination of tensors, margin and mining."""
    found: dict[tuple, Sample] = {}
    for sample in sorted(op.samples, key=size_of):
        tensors = [(k, len(flatten([v]))) for k, v in sample.tensors.items() if v is not None]
        kinds = type(sample.options.get("margin")), sample.options.get("mining")
        if size_of(sample) > 20:
            found.setdefault((*tensors, *kinds), sample)
    return list(found.values())


def moved(sample: Sample, to) -> Sample:
    """The sample with every tensor, those of its options too, passed through `to`."""
    parts = pytree.tree_map_only(Tensor, to, (sample.tensors, sample.options))
    return replace(sample, tensors=parts[0], options=parts[1])


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_a_call_on_fake_tensors_has_the_form_of_a_real_one(op, backend):
    op = find_op(op)
    for sample in calls(op):
        real = run(op, backend, sample)
        with FakeTensorMode() as mode:
            fake = run(op, backend, moved(sample, mode.from_tensor))
        for kind in ("outputs", "gradients"):
            found = getattr(fake, kind)
            assert all(isinstance(t, torch._subclasses.FakeTensor) for t in found), sample.name
            assert form(found) == form(getattr(real, kind)), sample.name


@pytest.mark.parametrize("op", OPS)
def test_a_call_on_meta_tensors_has_the_form_of_a_real_one(op):
    op = find_op(op)
    kdkernels.validate(True)
    try:
        for sample in calls(op):
            real = run(op, "eager", sample)
            meta = run(op, "eager", moved(sample, lambda t: t.to("meta")))
            assert all(t.is_meta for t in meta.outputs + meta.gradients), sample.name
            assert form(meta.outputs) == form(real.outputs), sample.name
    finally:
        kdkernels.validate(False)


class Returning(nn.Module):
    """A module that calls a function of the package."""

    def __init__(self, function, **options) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *inputs):
        return self.function(*inputs, **self.options)


X, Y, W = torch.randn(5, 4), torch.randn(5, 4), torch.randn(7, 4)
LABELS = torch.tensor([0, 3, 2, 2, 1])
TOP = kdkernels.SparseTeacher(torch.tensor([[0, 4]] * 5), torch.full((5, 2), -1.0))
PROGRAMS = {
    "KDTerms": (kdkernels.KDCrossEntropyLoss(return_terms=True), (X, Y, LABELS)),
    "KDTerms of a head": (kdkernels.LinearKDCrossEntropyLoss(return_terms=True), (X, W, LABELS)),
    "terms of pairs": (kdkernels.HiddenL2Loss(return_terms=True), ([X, Y], [Y, X])),
    "Nearest": (Returning(kdkernels.nearest_neighbor), (X, W)),
    "CombinedMargin": (Returning(kdkernels.adaface_margin), (X,)),
    "SparseTeacher": (
        Returning(lambda x, w, y, t: kdkernels.linear_kd_cross_entropy(x, w, y, teacher=t)),
        (X, W, LABELS, TOP),
    ),
    "classes": (
        Returning(lambda x, w, y, c: kdkernels.linear_kd_cross_entropy(x, w, y, classes=c)),
        (X, W, LABELS, torch.arange(5)),
    ),
    "TripletLoss": (kdkernels.TripletLoss(), (X, Y, X + 1)),
    "BatchTripletLoss": (kdkernels.BatchTripletLoss(), (X, LABELS)),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch.*")
def test_an_exported_program_is_saved_and_loaded(name):
    module, inputs = PROGRAMS[name]
    stored = io.BytesIO()
    torch.export.save(torch.export.export(module, inputs), stored)
    stored.seek(0)
    want = module(*inputs)
    got = torch.export.load(stored).module()(*inputs)
    assert type(got) is type(want)
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    torch.testing.assert_close(pytree.tree_leaves(got), pytree.tree_leaves(want), rtol=0, atol=0)
