"""One optimiser step and what belongs to it: parameter groups, learning rate, loss scaling,
clipping, and the running average of the weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from kdtrain.config import OptimConfig


def learning_rate(optim: OptimConfig, phase: int, epoch: int, done: float, step: float) -> float:
    """Learning rate of the step that leads from `done` to `done + step` epochs of this epoch.

    phase, epoch: the phase, and the epoch within it. With t the share of the phase that is done
    when the step begins, and w the epochs of the run that are done when it ends:

        lr(phase) * [f + (1 - f) (1 + cos(pi t)) / 2, for schedule "cosine"]
                  * min(1, w / warmup_epochs)

    f: final_lr_fraction. A function of the place alone, so that a resumed run meets the same rates,
    and in epochs, as the batches of an epoch need not be equally many (identities x images).
    """
    now = optim.phases[phase]
    rate = now.lr
    if optim.schedule == "cosine":
        share = (epoch + done) / now.epochs
        final = optim.final_lr_fraction
        rate *= final + (1 - final) * (1 + math.cos(math.pi * share)) / 2
    if optim.warmup_epochs:
        before = sum(p.epochs for p in optim.phases[:phase]) + epoch
        rate *= min(1.0, (before + done + step) / optim.warmup_epochs)
    return rate


def parameter_groups(parameters: Iterable[nn.Parameter], optim: OptimConfig) -> list[Any]:
    """The optimiser's groups: those with weight decay and, where no_decay asks for it, those
    without.

    Parameters of one dimension are the weights and biases of normalisations, the biases of layers
    and the slopes of PReLUs; all others have two dimensions and more.
    """
    parameters = list(parameters)
    if optim.no_decay == "none":
        return [{"params": parameters}]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Average:
    """Running average of a network's parameters, in float32; buffers are the network's own.

        average <- d average + (1 - d) weights,   d = min(decay, (1 + k) / (10 + k)) at step k

    The smaller d of the first steps lets go of the initial weights, which a short run would
    otherwise keep.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network, self._decay = network, decay
        self._values = {n: p.detach().float().clone() for n, p in network.named_parameters()}

    def update(self, step: int) -> None:
        """Take up the weights after optimiser step `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        ours = list(self._values.values())
        theirs = [p.detach().float() for p in self._network.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def weights(self) -> dict[str, Tensor]:
        """The network's state dict with the average in place of its parameters."""
        state = self._network.state_dict()
        return {
            n: self._values[n].to(t.dtype) if n in self._values else t for n, t in state.items()
        }

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from what `weights` returned."""
        for name, value in self._values.items():
            value.copy_(weights[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the averaged parameters; its own come back bit by bit."""
        own = {n: p.detach().clone() for n, p in self._network.named_parameters()}
        self._network.load_state_dict(self._values, strict=False)
        try:
            yield
        finally:
            self._network.load_state_dict(own, strict=False)


class Optimisation:
    """Nesterov SGD over a task's modules: `backward` for each batch of a step, then `step`."""

    def __init__(
        self,
        network: nn.Module,
        extra: nn.Module,
        optim: OptimConfig,
        *,
        device: str = "cpu",
        scaled: bool = False,
    ) -> None:
        """extra: modules that are trained beside the network, and neither averaged nor kept.
        device: type of theirs. scaled: scale the loss so that float16 gradients neither vanish nor
        overflow (torch.amp.GradScaler); a step that overflows all the same is skipped.
        """
        self.skipped, self.skipped_in_a_row = 0, 0
        self._clip_norm = optim.clip_norm
        self._network = network
        every = (*network.parameters(), *extra.parameters())
        self._parameters = [p for p in every if p.requires_grad]  # a frozen head is left alone
        self._optimizer = torch.optim.SGD(
            parameter_groups(self._parameters, optim),
            lr=optim.phases[0].lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            nesterov=True,
        )
        self._scaler = torch.amp.GradScaler(device, enabled=scaled)
        # the scaler does not tell whether it let the step happen
        self._optimizer.register_step_post_hook(self._mark)
        self._average = None if optim.ema is None else Average(network, optim.ema)

    def begin(self, rate: float) -> None:
        """Start a step at this learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a batch's share of the loss."""
        self._scaler.scale(loss).backward()

    def step(self, number: int) -> dict[str, Tensor] | None:
        """Clip and take step `number`, counted from 1; terms for the journal, as device scalars.

        None where the scaled gradient overflowed, so that nothing but the scale was changed.
        """
        terms = {}
        if self._clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            terms["gradient_norm"] = clip_grad_norm_(self._parameters, self._clip_norm)
        self._taken = False
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if not self._taken:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            return None
        self.skipped_in_a_row = 0
        if self._average is not None:
            self._average.update(number)
        return terms

    def _mark(self, *_: Any) -> None:
        self._taken = True

    def measured(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the network has the weights that are evaluated and kept."""
        return contextlib.nullcontext() if self._average is None else self._average.applied()

    def weights(self) -> dict[str, Tensor]:
        """The state dict that is kept: the network's, or its running average."""
        return self._network.state_dict() if self._average is None else self._average.weights()

    def momenta(self) -> dict[str, Tensor]:
        """Every momentum by a name for messages."""
        states = self._optimizer.state_dict()["state"].items()
        found = {f"momentum of parameter {i}": s.get("momentum_buffer") for i, s in states}
        return {name: values for name, values in found.items() if values is not None}

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside `weights`."""
        state: dict[str, Any] = {
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "skipped": (self.skipped, self.skipped_in_a_row),
        }
        if self._average is not None:
            state["trained"] = dict(self._network.state_dict())
        return state

    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint: what `weights` and `state` returned."""
        self._network.load_state_dict(dict(state.get("trained", weights)))
        self._optimizer.load_state_dict(dict(state["optimizer"]))
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(dict(state["scaler"]))
        self.skipped, self.skipped_in_a_row = state["skipped"]
        if self._average is not None:
            self._average.restore(weights)
