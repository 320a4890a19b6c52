"""Bounds on the rounding error of squared distances computed by a matrix product."""

import torch


def error_of_products(features: int, device_type: str) -> tuple[float, float]:
    """e and f: the error of n_i + n_j - 2 x_i.x_j in float32 is at most e (n_i + n_j) + f.

    n_i = ||x_i||^2. A dot product of D terms in any order errs by D u |x_i| |x_j| (u = 2^-24,
    Higham, "Accuracy and Stability of Numerical Algorithms", 3.1), and 2 |x_i| |x_j| <= n_i + n_j.
    40 u covers the rounding of the centered numbers, of the norms and of the sums; f covers values
    flushed to zero. Where torch may round the factors of a product, to TF32 (off by 2^-10 at most)
    or on the CPU to bfloat16 (2^-8), both together add twice that, and that
    share is doubled as a reserve.
    """
    relative = (features + 40) * 2.0**-24
    if not products_are_float32(device_type):
        relative += 2.0**-8 if device_type == "cuda" else 2.0**-6
    return relative, features * 1e-36


def products_are_float32(device_type: str) -> bool:
    """Whether torch's settings keep float32 matrix products of that device in float32."""
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    # "none" defers to the next setting; torch.set_float32_matmul_precision sets the first
    for setting in (getattr(backend, "matmul", None), backend, torch.backends):
        precision = getattr(setting, "fp32_precision", "none")
        if precision != "none":
            return precision == "ieee"
    return True
