"""Tools for the GPU kernels: `bench/gpu.sh`, sanitizers, counted memory traffic."""
