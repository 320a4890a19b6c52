"""Hides the extension from every Python process that has this folder on PYTHONPATH."""

import sys

sys.modules["kdkernels._native"] = None  # type: ignore[assignment]
