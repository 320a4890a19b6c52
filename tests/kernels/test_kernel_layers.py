"""Which module of kdkernels may import which, read from the imports (docs/architecture.md)."""

import sys

import pytest
from conftest import ROOT
from imports import imports, ours

# the head's rows are those of the logits' op, and its specification is on its specification
BUILDS_ON = {"linear_kd_cross_entropy": "kd_cross_entropy"}
OPS = sorted(p.name for p in (ROOT / "kdkernels").iterdir() if (p / "op.py").exists())


@pytest.mark.parametrize("op", OPS)
def test_the_specification_and_the_samples_know_torch_only(op):
    under = BUILDS_ON.get(op, op)
    for name in ("eager.py", "samples.py", "margins.py"):
        if not (ROOT / "kdkernels" / op / name).exists():
            assert name == "margins.py"
            continue
        allowed = (
            "kdkernels.sample",
            f"kdkernels.{op}.eager",
            f"kdkernels.{op}.margins",
            f"kdkernels.{under}.eager",
        )
        for module in ours(ROOT / "kdkernels" / op / name):
            assert module.startswith(allowed), f"{op}/{name} imports {module}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_imports_no_other_op(op):
    for path in (ROOT / "kdkernels" / op).glob("*.py"):
        for module in ours(path):
            other = module.split(".")[1]
            allowed = (op, BUILDS_ON.get(op))
            assert other not in OPS or other in allowed, f"{path.name} of {op} imports {module}"


def is_outside(module: str, allowed: tuple[str, ...]) -> bool:
    """Whether a module is neither of the standard library nor below one of the allowed names."""
    top = module.split(".")[0]
    return top not in sys.stdlib_module_names and not any(
        module == name or module.startswith(f"{name}.") for name in allowed
    )


@pytest.mark.parametrize("op", OPS)
def test_triton_kernels_know_torch_triton_and_their_shared_code_only(op):
    own = [path.stem for path in (ROOT / "kdkernels" / op).glob("triton_*.py")]
    assert own
    allowed = ("torch", "triton", "kdkernels.triton_rows", *(f"kdkernels.{op}.{n}" for n in own))
    if op in BUILDS_ON:
        shared = ("chunks", "head", "tail")  # of both backends: torch, and no kernel
        allowed += (f"kdkernels.{BUILDS_ON[op]}.triton_kernel",)
        allowed += tuple(f"kdkernels.{op}.{name}" for name in shared)
        for name in shared:
            for module in imports(ROOT / "kdkernels" / op / f"{name}.py"):
                known = ("torch", *(f"kdkernels.{op}.{other}" for other in shared))
                assert not is_outside(module, known), f"{op}/{name}.py"
    for name in own:
        for module in imports(ROOT / "kdkernels" / op / f"{name}.py"):
            assert not is_outside(module, allowed), f"{op}/{name}.py imports {module}"


def test_what_triton_kernels_share_knows_torch_and_triton_only():
    for module in imports(ROOT / "kdkernels" / "triton_rows.py"):
        assert not is_outside(module, ("torch", "triton")), f"triton_rows imports {module}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_names_its_triton_kernels_and_imports_them_at_the_first_call(op):
    for path in (ROOT / "kdkernels" / op).glob("*.py"):
        if not path.name.startswith("triton_"):
            for module in imports(path):
                assert "triton" not in module.split("."), f"{op}/{path.name} imports {module}"
                assert ".triton_" not in module, f"{op}/{path.name} imports {module}"
        if path.name.endswith("op.py"):
            assert f'"kdkernels.{op}.triton_' in path.read_text(), f"{op}/{path.name}"


def test_the_oracle_shares_no_code_with_the_kernels():
    for op in OPS:
        text = (ROOT / "kdkernels" / op / "eager.py").read_text()
        assert "torch.ops.kdkernels" not in text
        assert "native" not in text
        assert "triton" not in text


def test_kdkernels_imports_nothing_above_it():
    for path in (ROOT / "kdkernels").rglob("*.py"):
        for module in ours(path):
            assert module.startswith("kdkernels"), f"{path} imports {module}"
