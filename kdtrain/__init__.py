"""Trains and distils face networks for three tasks: `python -m kdtrain`."""
