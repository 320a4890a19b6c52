"""Fixtures of the whole suite."""

import os
import sys
from pathlib import Path

import interpreted
import pytest
import torch

import kdkernels
from kdkernels.backends import is_interpreted

ROOT = Path(__file__).resolve().parent.parent
# bench is no installed package; and tests/bench or tests/kdtrain must not be found in its place.
# At the end of the path: an installed kdkernels comes before the one of this checkout.
sys.path.append(str(ROOT))


def pytest_configure(config: pytest.Config) -> None:
    # NumPy, which the interpreter computes with, warns of the infinities and NaNs that samples hold
    # on purpose; a GPU does not.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    if is_interpreted():
        interpreted.prepare()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("PROVE") != "1":
        for item in items:
            if item.get_closest_marker("prove"):
                item.add_marker(pytest.mark.skip(reason="PROVE=1 runs it, as make prove does"))


@pytest.fixture(autouse=True)
def _same_threads_and_level():
    """A test that changes the thread count or the SIMD level does not change the next one."""
    threads, level = torch.get_num_threads(), kdkernels.isa()
    yield
    torch.set_num_threads(threads)
    if level:
        kdkernels.set_isa(level)


@pytest.fixture(scope="session")
def faces() -> Path:
    """The folder with real photographs, in CelebA's layout; tests that ask for it skip without."""
    root = Path(os.environ.get("KDTRAIN_FACES", ROOT.parent / "shared" / "faces"))
    if not (root / "list_landmarks_align_celeba.txt").exists():
        pytest.skip(f"no photographs at {root}: set KDTRAIN_FACES to a folder in CelebA's layout")
    return root
