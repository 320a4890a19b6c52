"""How networks run in training: the number format, and whether they are compiled.

Evaluation runs them as they are, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdtrain.config import ConfigError, TrainConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Passes:
    """Calls networks under train.precision (torch.autocast: weights stay float32) and
    train.compile.

    Losses stay outside and take what comes out as it is.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._dtype = DTYPES.get(train.precision)
        self._compile = train.compile
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, run: Callable[..., Any], pictures: Tensor, *options: Any) -> Any:
        """run(pictures, *options); run: a network, or one of its methods.

        Raises ConfigError where train.compile fails.
        """
        # a context of its own for each call: the casts it keeps were made with or without gradient
        with torch.autocast(pictures.device.type, self._dtype, enabled=self._dtype is not None):
            if not self._compile:
                return run(pictures, *options)
            from torch._dynamo.exc import TorchDynamoException

            try:
                if run not in self._compiled:
                    # static shapes: kernels for any shape would depend on which ones came first,
                    # and a resumed run meets them in another order. The network is wrapped, not
                    # changed, so that its state dict keeps its names.
                    self._compiled[run] = torch.compile(run, dynamic=False)
                return self._compiled[run](pictures, *options)
            except TorchDynamoException as error:
                said = " ".join(str(error).split("\n\n")[0].split())  # the rest is advice to torch
                raise ConfigError(
                    f"train.compile: torch.compile cannot compile the network here ({said}); on a "
                    "processor it needs a C++ compiler, on a GPU Triton. Install it, or set "
                    "train.compile to false"
                ) from error
