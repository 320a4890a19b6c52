"""An optimiser step: groups, learning rate, loss scale, clipping, and a moving average."""

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
    """Returns the learning rate of the step from `done` to `done + step` of an epoch of a phase.

        lr(phase) * [f + (1 - f) (1 + cos(pi t)) / 2, for schedule "cosine"]
                  * min(1, w / warmup_epochs)

    t: share of the phase done before the step; w: epochs of the run done after it; f:
    final_lr_fraction. In epochs, as the number of batches may differ between epochs.
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
    """Returns the optimiser's groups: parameters with weight decay and, by no_decay, those without.

    Weights of normalisations, biases and slopes of PReLUs have one dimension, all others more.
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
    """Moving average of a network's parameters, in float32; buffers are the network's own.

        average <- d average + (1 - d) weights,   d = min(decay, (1 + k) / (10 + k)) at step k

    d is smaller in the first steps, so that a short run does not keep its initial weights.
    torch.optim.swa_utils.AveragedModel copies the weights at its first update and counts its own
    updates, not optimiser steps, so its averages are others.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network, self._decay = network, decay
        self._values = {n: p.detach().float().clone() for n, p in network.named_parameters()}

    def update(self, step: int) -> None:
        """Adds the weights after optimiser step `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        ours = list(self._values.values())
        theirs = [p.detach().float() for p in self._network.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def weights(self) -> dict[str, Tensor]:
        """Returns the network's state dict with the average in place of its parameters."""
        state = self._network.state_dict()
        return {
            n: self._values[n].to(t.dtype) if n in self._values else t for n, t in state.items()
        }

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Restores the result of `weights`."""
        for name, value in self._values.items():
            value.copy_(weights[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the network the averaged parameters, and its own back afterwards."""
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
        """extra: modules that are trained beside the network, not averaged, and dropped later.
        scaled: scale the loss for float16 (torch.amp.GradScaler) and skip steps that overflow.
        """
        self.skipped, self.skipped_in_a_row = 0, 0
        self._clip_norm = optim.clip_norm
        self._network = network
        every = (*network.parameters(), *extra.parameters())
        self._parameters = [p for p in every if p.requires_grad]  # without a frozen head
        self._optimizer = torch.optim.SGD(
            parameter_groups(self._parameters, optim),
            lr=optim.phases[0].lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            nesterov=True,
        )
        self._scaler = torch.amp.GradScaler(device, enabled=scaled)
        # GradScaler.step does not return whether the step was taken
        self._optimizer.register_step_post_hook(self._mark)
        self._average = None if optim.ema is None else Average(network, optim.ema)

    def begin(self, rate: float) -> None:
        """Begins a step at this learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a batch's share of the loss."""
        self._scaler.scale(loss).backward()

    def step(self, number: int) -> dict[str, Tensor] | None:
        """Clips and takes step `number`, counted from 1; returns terms for the journal as device
        scalars, or None if the scaled gradient overflowed and only the scale changed.
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
        """Gives the network the weights that are evaluated and saved."""
        return contextlib.nullcontext() if self._average is None else self._average.applied()

    def weights(self) -> dict[str, Tensor]:
        """Returns the state dict to save: the network's, or its moving average."""
        return self._network.state_dict() if self._average is None else self._average.weights()

    def momenta(self) -> dict[str, Tensor]:
        """Returns every momentum by a name for messages."""
        states = self._optimizer.state_dict()["state"].items()
        found = {f"momentum of parameter {i}": s.get("momentum_buffer") for i, s in states}
        return {name: values for name, values in found.items() if values is not None}

    def state(self) -> dict[str, Any]:
        """Returns the state of a checkpoint beside `weights`."""
        state: dict[str, Any] = {
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "skipped": (self.skipped, self.skipped_in_a_row),
        }
        if self._average is not None:
            state["trained"] = dict(self._network.state_dict())
        return state

    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restores the results of `weights` and `state`."""
        self._network.load_state_dict(dict(state.get("trained", weights)))
        self._optimizer.load_state_dict(dict(state["optimizer"]))
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(dict(state["scaler"]))
        self.skipped, self.skipped_in_a_row = state["skipped"]
        if self._average is not None:
            self._average.restore(weights)
