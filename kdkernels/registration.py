"""Registration of the raw ops and the public types, and the transfer of gradients in backward."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kdkernels import native as calls

library = torch.library.Library("kdkernels", "DEF")


def define(
    name: str, signature: str, fake: Callable, *, native: Callable | None, triton: str | None
) -> None:
    """Registers a raw op for each backend: `name` for native, `name`_triton for triton.

    signature: "(Tensor student, ...) -> (...)". triton: "module:function", imported at the first
    call, because importing Triton takes longer than importing kdkernels.
    """
    if native is not None:
        library.define(f"{name}{signature}")
        torch.library.register_fake(f"kdkernels::{name}", fake, lib=library)
        library.impl(name, native, "CPU")
    if triton is not None:
        module, function = triton.split(":")

        def launch(*arguments: Any) -> Any:
            return getattr(importlib.import_module(module), function)(*arguments)

        library.define(f"{name}_triton{signature}")
        torch.library.register_fake(f"kdkernels::{name}_triton", fake, lib=library)
        for key in ("CPU", "CUDA"):  # on the CPU choose_backend allows it in the interpreter alone
            library.impl(f"{name}_triton", launch, key)


def raw(name: str, backend: str) -> Callable:
    """The raw op of that name on a backend."""
    return getattr(torch.ops.kdkernels, name if backend == "native" else f"{name}_{backend}")


def register_types(*types: type) -> None:
    """Makes NamedTuples and dataclasses of tensors part of what torch.export saves and loads."""
    torch.serialization.add_safe_globals(list(types))
    for kind in types:
        name = f"kdkernels.{kind.__name__}"
        if dataclasses.is_dataclass(kind):
            pytree.register_dataclass(kind, serialized_type_name=name)
        else:
            pytree._register_namedtuple(kind, serialized_type_name=name)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient is needed. Call it outside the autograd.Function.

    Inside, ctx.needs_input_grad is True under no_grad as well.
    """
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class GivenAway(RuntimeError):
    """Raised when backward needs a gradient that it has given away before."""


def claim_gradients(ctx, op: str) -> None:
    """Raises GivenAway where backward cannot run: the stored gradient is scaled in place and given
    away once."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        raise GivenAway(
            f"{op}: double backward (create_graph=True) is not available in kernels: "
            f'use backend="eager"'
        )
    if getattr(ctx, "given_away", False):
        raise GivenAway(
            f"{op}: a second backward through the same graph needs the gradient that the first one "
            f'gave away: use backend="eager", or call {op} again'
        )
    ctx.given_away = True


def _give_gradient_fake(gradient: Tensor, incoming: Tensor, post_scale: Tensor) -> None:
    return None


define(
    "give_gradient_",
    "(Tensor(a!) gradient, Tensor incoming, Tensor post_scale) -> ()",
    _give_gradient_fake,
    native=calls.give_gradient,
    triton="kdkernels.triton_common:give_gradient_",
)


def give_gradient(gradient: Tensor, incoming: Tensor, post_scale: Tensor, backend: str) -> Tensor:
    """`gradient` times the incoming one (0-d, or one per row) and `post_scale`, in place.

    Returns at once where both are 1.
    """
    raw("give_gradient_", backend)(gradient, incoming, post_scale)
    return gradient
