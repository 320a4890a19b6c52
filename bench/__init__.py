"""Benchmarks of kdkernels against what users write today: `python -m bench`."""
