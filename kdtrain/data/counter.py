"""Random numbers as a pure function of counters: no generator, no state, the same on any device.

A number depends only on its keys (a seed, an epoch, an image's index), not on batches or workers.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# the second multiplier minus 2^32: |product| stays below 2^63, the low 32 bits are equal
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_WEYL = 0x9E3779B9


def mix(words: Tensor) -> Tensor:
    """Returns a bijective 32-bit scrambling of int64 words in [0, 2^32) (Wellons' lowbias32)."""
    words = words ^ (words >> 16)
    words = (words * _FIRST) & _MASK
    words = words ^ (words >> 15)
    words = (words * _SECOND) & _MASK
    return words ^ (words >> 16)


def counter_hash(*keys: int | Tensor) -> Tensor:
    """Returns 32-bit hashes, int64 in [0, 2^32), of the broadcast keys.

    keys: at least one int or int64 tensor; all 64 bits of each and their order matter.
    """
    device = next((key.device for key in keys if isinstance(key, Tensor)), torch.device("cpu"))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for place, key in enumerate(keys):
        key = torch.as_tensor(key, device=device).long()
        state = mix((state + _WEYL * (2 * place + 1)) & _MASK ^ mix(key & _MASK))
        state = mix((state + _WEYL * (2 * place + 2)) & _MASK ^ mix((key >> 32) & _MASK))
    return state


def counter_uniform(*keys: int | Tensor, draws: int) -> Tensor:
    """Returns uniform float32 numbers in [0, 1), multiples of 2^-24: (*broadcast keys, draws)."""
    base = counter_hash(*keys).unsqueeze(-1)
    number = torch.arange(draws, device=base.device)
    return (mix((base + _WEYL * (number + 1)) & _MASK) >> 8).float() * 2.0**-24


def counter_normal(*keys: int | Tensor, draws: int) -> Tensor:
    """Returns standard normal float64 numbers, within +-5.3: (*broadcast keys, draws)."""
    uniform = counter_uniform(*keys, draws=draws).double() + 2.0**-25
    return math.sqrt(2.0) * torch.erfinv(2 * uniform - 1)


def counter_permutation(count: int, *keys: int) -> Tensor:
    """Returns a permutation of range(count), int64 on the CPU: the hashes of (keys, i), sorted."""
    positions = torch.arange(count)
    return torch.argsort(counter_hash(*keys, positions), stable=True)
