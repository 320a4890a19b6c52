"""One op call, as contract, tests and benchmarks share it; each op's samples.py makes them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Argument = Tensor | list[Tensor] | None


@dataclass(frozen=True)
class Sample:
    """One call `function(**tensors, **options)`; gradients are those of `differentiable`."""

    name: str
    tensors: dict[str, Argument]
    options: dict[str, object] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()

    def to(self, dtype: torch.dtype) -> "Sample":
        """The same call with every floating-point tensor in `dtype`, with its strides."""

        def convert(value: Argument) -> Argument:
            if isinstance(value, list):
                return [t for t in map(convert, value) if isinstance(t, Tensor)]
            if value is None or not value.is_floating_point() or value.dtype == dtype:
                return value
            return value.to(dtype) if 0 in value.stride() else keep_strides(value, dtype)

        return replace(self, tensors={k: convert(v) for k, v in self.tensors.items()})

    def with_options(self, **options: object) -> "Sample":
        """The same call with other options."""
        return replace(self, options={**self.options, **options})


def keep_strides(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `value` in `dtype` with the same shape and strides."""
    copy = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device)
    return copy.copy_(value)
