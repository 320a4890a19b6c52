"""Which module of kdkernels may import which, read from the imports (docs/architecture.md)."""

import sys

import pytest
from conftest import ROOT
from imports import imports, ours

PACKAGE = ROOT / "kdkernels"
OPS = sorted(p.name for p in PACKAGE.iterdir() if (p / "op.py").exists())
# an op whose specification and kernels use those of another
BUILDS_ON = {
    "linear_kd_cross_entropy": "kd_cross_entropy",
    "batch_triplet_loss": "triplet_loss",
}
# of both kernel backends of an op: torch, and no kernel
SHARED = {"linear_kd_cross_entropy": ("driver", "products", "sparse_teacher")}


def is_outside(module: str, allowed: tuple[str, ...]) -> bool:
    """Whether a module is neither of the standard library nor below one of the allowed names."""
    top = module.split(".")[0]
    return top not in sys.stdlib_module_names and not any(
        module == name or module.startswith(f"{name}.") for name in allowed
    )


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_the_same_files(op):
    names = {path.name for path in (PACKAGE / op).glob("*.py")}
    common = {"__init__.py", "eager.py", "native.py", "op.py", "samples.py", "triton_kernel.py"}
    assert common <= names, common - names


@pytest.mark.parametrize("op", OPS)
def test_the_specification_and_the_samples_import_torch_only(op):
    allowed = (
        "torch",
        "kdkernels.sample",
        f"kdkernels.{op}.eager",
        f"kdkernels.{op}.margins",
        f"kdkernels.{BUILDS_ON.get(op, op)}.eager",
    )
    for name in ("eager.py", "samples.py", "margins.py"):
        path = PACKAGE / op / name
        for module in imports(path) if path.exists() else ():
            assert not is_outside(module, allowed), f"{op}/{name} imports {module}"


@pytest.mark.parametrize("op", OPS)
def test_native_imports_the_extension_and_its_own_op_only(op):
    allowed = (
        "torch",
        "kdkernels.native",
        "kdkernels.checks.reject",
        "kdkernels.product_error",
        f"kdkernels.{op}.eager",
        *(f"kdkernels.{op}.{name}" for name in SHARED.get(op, ())),
    )
    for module in imports(PACKAGE / op / "native.py"):
        assert not is_outside(module, allowed), f"{op}/native.py imports {module}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_imports_no_other_op(op):
    for path in (PACKAGE / op).glob("*.py"):
        for module in ours(path):
            other = module.split(".")[1]
            allowed = (op, BUILDS_ON.get(op))
            assert other not in OPS or other in allowed, f"{path.name} of {op} imports {module}"


@pytest.mark.parametrize("op", OPS)
def test_triton_kernels_import_torch_triton_and_their_shared_code_only(op):
    own = [path.stem for path in (PACKAGE / op).glob("triton_*.py")]
    allowed = (
        "torch",
        "triton",
        "kdkernels.triton_common",
        "kdkernels.product_error",
        f"kdkernels.{BUILDS_ON.get(op, op)}.triton_kernel",
        *(f"kdkernels.{op}.{name}" for name in (*own, *SHARED.get(op, ()))),
    )
    for name in own:
        for module in imports(PACKAGE / op / f"{name}.py"):
            assert not is_outside(module, allowed), f"{op}/{name}.py imports {module}"


@pytest.mark.parametrize(("op", "name"), [(op, n) for op, names in SHARED.items() for n in names])
def test_code_shared_by_both_kernel_backends_imports_torch_only(op, name):
    known = ("torch", *(f"kdkernels.{op}.{other}" for other in SHARED[op]))
    for module in imports(PACKAGE / op / f"{name}.py"):
        assert not is_outside(module, known), f"{op}/{name}.py imports {module}"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("triton_common", ("torch", "triton")),
        ("product_error", ("torch",)),
        ("native", ("torch", "kdkernels._native")),
        ("checks", ("torch",)),
        ("sample", ("torch",)),
        ("backends", ("torch", "kdkernels.native", "kdkernels._build_info")),
        ("registration", ("torch", "kdkernels.native")),
    ],
)
def test_code_shared_by_the_ops_imports_no_op(name, allowed):
    for module in imports(PACKAGE / f"{name}.py"):
        assert not is_outside(module, allowed), f"{name} imports {module}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_imports_its_triton_kernels_at_the_first_call(op):
    for path in (PACKAGE / op).glob("*.py"):
        if not path.name.startswith("triton_"):
            for module in imports(path):
                assert "triton" not in module.split("."), f"{op}/{path.name} imports {module}"
                assert ".triton_" not in module, f"{op}/{path.name} imports {module}"
    assert f'"kdkernels.{op}.triton_kernel' in (PACKAGE / op / "op.py").read_text()


def test_the_oracle_shares_no_code_with_the_kernels():
    for op in OPS:
        text = (PACKAGE / op / "eager.py").read_text()
        assert "torch.ops.kdkernels" not in text
        assert "native" not in text
        assert "triton" not in text


def test_kdkernels_imports_nothing_above_it():
    for path in PACKAGE.rglob("*.py"):
        for module in ours(path):
            assert module.startswith("kdkernels"), f"{path} imports {module}"
