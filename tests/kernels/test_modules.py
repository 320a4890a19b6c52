"""The losses as users carry them about: DDP, pickle, state_dict, autocast, torch.compile."""

import copy
import io
import pickle
import socket
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import kdkernels
from kdkernels.backends import backends

MODULES = {
    "KDCrossEntropyLoss": {"temperature": 2.0, "alpha": 0.5},
    "TripletLoss": {"margin": 0.2},
    "BatchTripletLoss": {"mining": "hard"},
    "HiddenL2Loss": {"reduction": "mean"},
    "CrossEntropyLoss": {"label_smoothing": 0.1},
    "TripletMarginLoss": {"margin": 0.7},
}


def inputs(name: str) -> tuple:
    """Arguments for one call, the first of which needs a gradient."""
    generator = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(8, 20, generator=generator) for _ in range(3))
    labels = torch.arange(8) % 4
    a.requires_grad_()
    return {
        "KDCrossEntropyLoss": (a, b, labels),
        "CrossEntropyLoss": (a, labels),
        "BatchTripletLoss": (a, labels),
        "HiddenL2Loss": ([a], [b]),
    }.get(name, (a, b, c))


def loss_and_gradient(module: nn.Module, name: str):
    arguments = inputs(name)
    loss = module(*arguments)
    leaf = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("name", MODULES)
def test_pickle_deepcopy_and_state_dict_keep_the_loss(name):
    module = getattr(kdkernels, name)(**MODULES[name])
    want = loss_and_gradient(module, name)
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    fresh = getattr(kdkernels, name)(**MODULES[name])
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), fresh):
        got = loss_and_gradient(other, name)
        assert all(map(torch.equal, want, got))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_shows_its_options(name):
    text = repr(getattr(kdkernels, name)(**MODULES[name]))
    assert any(str(value) in text for value in MODULES[name].values()) or name in (
        "CrossEntropyLoss",  # torch's own repr shows nothing
        "TripletMarginLoss",
    )


@pytest.mark.parametrize("name", MODULES)
def test_inductor_compiles_the_whole_module(name):
    """The real compiler, once a module; the contract uses the quick aot_eager."""
    torch._dynamo.reset()
    module = getattr(kdkernels, name)(**MODULES[name])
    want = loss_and_gradient(module, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own deprecations
        got = loss_and_gradient(torch.compile(module, fullgraph=True), name)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(12, 10)
        self.head = nn.Linear(10, 30)

    def forward(self, x):
        hidden = self.trunk(x)
        return hidden, self.head(hidden)


def total_loss(student: nn.Module, rows: slice) -> torch.Tensor:
    """Every loss at once, on a share of one fixed batch."""
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(16, 12, generator=generator), torch.randn(16, 30, generator=generator)
    k = torch.randn(16, 10, generator=generator)
    labels = torch.arange(16) // 2 % 4
    hidden, logits = student(x[rows])
    loss = kdkernels.kd_cross_entropy(logits, t[rows], labels[rows])
    loss = loss + kdkernels.batch_triplet_loss(hidden, labels[rows], mining="all")
    return loss + kdkernels.hidden_l2([hidden], [k[rows]])


def train_rank(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    student = nn.parallel.DistributedDataParallel(Student())
    total_loss(student, slice(8 * rank, 8 * rank + 8)).backward()
    if rank == 0:
        queue.put([p.grad.numpy().copy() for p in student.parameters()])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ddp_averages_the_gradients_of_the_two_halves():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=train_rank, args=(r, port, queue)) for r in range(2)]
    for rank in ranks:
        rank.start()
    got = queue.get(timeout=120)
    for rank in ranks:
        rank.join(timeout=60)
        assert rank.exitcode == 0
    torch.manual_seed(0)
    student = Student()
    halves = (total_loss(student, slice(0, 8)) + total_loss(student, slice(8, 16))) / 2
    halves.backward()
    for a, b in zip(got, student.parameters(), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif("native" not in backends("kd_cross_entropy", "cpu"), reason="needs native")
def test_a_training_step_under_autocast_equals_one_on_the_cast_logits():
    torch.manual_seed(0)
    student = nn.Linear(12, 30)
    x, t, y = torch.randn(6, 12), torch.randn(6, 30), torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = student(x)
        assert logits.dtype == torch.bfloat16
        loss = kdkernels.kd_cross_entropy(logits, t, y)
    assert loss.dtype == torch.float32
    loss.backward()
    by_hand = logits.detach().float().requires_grad_()
    kdkernels.kd_cross_entropy(by_hand, t, y, backend="eager").backward()
    want = by_hand.grad.bfloat16().T @ x.bfloat16()
    torch.testing.assert_close(student.weight.grad, want.float(), rtol=5e-2, atol=1e-3)
