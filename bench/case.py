"""A benchmark case: an op on inputs of one kind and size, its contenders, its floors."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import kdkernels

Inputs = dict[str, Any]  # tensors and lists of tensors, by the op's parameter names
OWN = {"cpu": "native", "cuda": "triton"}  # the backend that is measured, and its contender's name


@dataclass(frozen=True)
class Contender:
    """One way to compute a case's result: `call(**inputs, **options)`."""

    name: str
    call: Callable[..., Any]
    # its own definition, where it differs from the case's
    truth: Callable[..., Any] | None = None
    inputs: Callable[..., Inputs] | None = None  # where its inputs differ from the case's
    modules: tuple[str, ...] = ()  # packages that must be importable
    install: str = ""  # the command that installs them
    compiles: bool = False  # the first call at a shape compiles, by a C++ compiler
    tolerance: float = 0.0  # of its check, where it needs more than the others
    waits: bool = False  # its calls wait for the GPU, so no CUDA graph can hold them

    def missing(self) -> str:
        """The reason why it cannot run here; empty where it can."""
        absent = [m for m in self.modules if importlib.util.find_spec(m) is None]
        if absent:
            return f"{', '.join(absent)} not installed: {self.install}"
        if self.compiles and not any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"])):
            return "torch.compile needs a C++ compiler"
        return ""


@dataclass(frozen=True)
class Floor:
    """Work that every implementation must do; `prepare(inputs)` preallocates, returns the call."""

    name: str
    prepare: Callable[[Inputs], Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """An op on inputs of one kind and size against its contenders, its own kernel first."""

    op: str
    name: str
    about: str
    inputs: Callable[..., Inputs]  # inputs(seed, device, **sizes)
    sizes: dict[str, Any]
    quick: dict[str, Any]  # sizes for --quick and for warm-up before memory is measured
    contenders: tuple[Contender, ...]
    floors: tuple[Floor, ...]  # the fastest of them counts
    options: dict[str, Any] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()  # inputs whose gradient is taken; none: forward alone
    gradients: tuple[float, ...] = (1.0, 0.37)
    rounds: int = 40
    isa: str = ""  # a fixed instruction-set level; empty: the highest, or --isa
    device: str = "cpu"
    check_rows: int = 0  # number of results, evenly spaced, to compare with float64; 0: all
    one_by_one: bool = False  # the truth is a sum over the pairs of two lists, taken one by one
    # the necessary work, for a rate: (bytes or operations, unit of 1e9 or 1e12 per second)
    work: Callable[[Inputs], tuple[float, str]] | None = None

    # The specification in parts, where all of it at once would take too much memory in float64.
    in_parts: Callable[..., Any] | None = None

    def truth(self) -> Callable[..., Any]:
        """The specification: kdkernels' eager backend, given float64 inputs."""
        return self.in_parts or op_call(self.op, "eager")

    def contender(self, name: str) -> Contender:
        """The contender of that name."""
        return next(c for c in self.contenders if c.name == name)

    @property
    def own(self) -> str:
        """The name of kdkernels' kernel among the contenders: its backend."""
        return self.contenders[0].name


def op_call(op: str, backend: str | None) -> Callable[..., Any]:
    """kdkernels' op on a backend (None: the default), looked up when called: an op may not exist
    yet."""

    def call(**arguments: Any) -> Any:
        return getattr(kdkernels, op)(**arguments, backend=backend)

    return call


def as_list(value: Any) -> list[Tensor]:
    """A tensor or a list of tensors as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def tensors_of(inputs: Inputs, names: tuple[str, ...]) -> list[Tensor]:
    """The tensors of the named inputs."""
    return [t for name in names for t in as_list(inputs[name])]
