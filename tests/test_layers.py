"""Which module may import which, read from the imports (docs/architecture.md)."""

from conftest import ROOT
from imports import ours


def test_in_kdtrain_only_the_loss_layer_imports_kdkernels_and_only_public_names():
    allowed = {"tasks.py", "targets.py", "heads.py", "evaluate.py"}
    for path in (ROOT / "kdtrain").rglob("*.py"):
        for module in ours(path):
            if not module.startswith("kdkernels"):
                assert module.startswith("kdtrain"), f"{path} imports {module}"
            elif path.name in allowed:
                assert module.count(".") == 1, f"{path.name} imports a private {module}"
            else:
                version = ("kdkernels.__version__", "kdkernels.isa")
                assert module in version, f"{path.name} imports {module}"


def test_the_engine_knows_no_task_by_name():
    engine = ROOT / "kdtrain" / "engine.py"
    text = engine.read_text()
    for task in ("classification", "alignment", "verification"):
        assert f'"{task}"' not in text
