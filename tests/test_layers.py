"""Which module may import which, read from the imports (docs/architecture.md)."""

from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT
from imports import imports, ours

from kdtrain.training.keys import HASHED_ROOMS, NOT_HASHED

PACKAGE = ROOT / "kdtrain"
ROOMS = ("cli", "experiments", "reports", "training", "objectives", "models", "data", "config")
"""In their order: a room imports rooms to its right."""


def name_of(path: Path) -> str:
    """The dotted name of a module of kdtrain."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """The room of a dotted module of kdtrain; "" for the package itself and __main__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def imported(path: Path) -> set[str]:
    """The modules of kdtrain that a file imports, lazily or under TYPE_CHECKING too."""
    found = set()
    for name in ours(path):
        # kdtrain.data.store.ImageStore is of the module kdtrain.data.store
        module = name if name in MODULES else name.rpartition(".")[0]
        found |= {module} & set(MODULES)
    return found


def test_every_module_stands_in_a_room():
    outside = {name for name in MODULES if not room(name)}
    assert outside == {"kdtrain", "kdtrain.__main__"}


def test_rooms_import_rooms_to_their_right_only():
    upward = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in imported(path)
        if room(name) and room(other) and ROOMS.index(room(other)) < ROOMS.index(room(name))
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imported(path) - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_configuration_knows_no_torch():
    for name, path in MODULES.items():
        if room(name) == "config":
            tops = {module.partition(".")[0] for module in imports(path)}
            assert "torch" not in tops, name


@pytest.mark.parametrize("package", ["models.published", "training.journal", "training.published"])
def test_packages_that_are_not_hashed_say_so(package):
    assert package.replace(".", "/") in NOT_HASHED
    assert "Not hashed into the key of a run" in MODULES[f"kdtrain.{package}"].read_text()


def test_the_hashed_rooms_are_those_that_training_runs():
    assert set(HASHED_ROOMS) == set(ROOMS[ROOMS.index("training") :])
    assert len(NOT_HASHED) == 3, "a package is added here and to the test above"


def test_in_kdtrain_only_the_objectives_import_kdkernels_and_only_public_names():
    for path in MODULES.values():
        for module in ours(path):
            if not module.startswith("kdkernels"):
                assert module.startswith("kdtrain"), f"{path} imports {module}"
            elif room(name_of(path)) == "objectives":
                assert module.count(".") == 1, f"{path.name} imports a private {module}"
            else:
                version = ("kdkernels.__version__", "kdkernels.isa")
                assert module in version, f"{path.name} imports {module}"


def test_the_engine_knows_no_task_by_name():
    text = MODULES["kdtrain.training.engine"].read_text()
    for task in ("classification", "alignment", "verification"):
        assert f'"{task}"' not in text
