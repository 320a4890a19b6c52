"""Importing kdkernels: light, fork-safe, whole without the extension, loud with a broken one."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

import kdkernels
from kdkernels.__main__ import main, table
from kdkernels.backends import OPS, native_missing
from kdkernels.native import extension


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )


def test_import_pulls_in_no_trainer_dependency():
    done = python(
        "import sys, kdkernels; "
        "print([m for m in ('rich', 'jsonargparse', 'matplotlib', 'PIL', 'safetensors', 'triton') "
        "if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_without_the_extension_every_op_runs_on_eager():
    hidden = str(ROOT / "tests" / "kernels" / "without_native")
    done = python(
        "import torch, kdkernels; x = torch.randn(2, 5); y = torch.tensor([0, 1]);"
        "print(kdkernels.backends('kd_cross_entropy', 'cpu'), "
        "float(kdkernels.kd_cross_entropy(x, x, y)) > 0)",
        PYTHONPATH=hidden,
    )
    assert done.stdout.strip() == "('eager',) True", done.stderr


def test_a_broken_extension_is_not_mistaken_for_a_missing_one(tmp_path):
    package = tmp_path / "kdkernels"
    package.mkdir()
    for path in (ROOT / "kdkernels").rglob("*.py"):
        target = package / path.relative_to(ROOT / "kdkernels")
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text())
    (package / "_native.py").write_text("raise ImportError('libgomp.so.1: cannot open')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import kdkernels"
    done = python(code, PYTHONPATH="")  # not where a run without the extension hides it
    assert done.returncode != 0
    assert "libgomp.so.1: cannot open" in done.stderr


def test_the_table_names_every_op_and_why_a_backend_is_missing():
    text = table()
    assert all(op in text for op in OPS)
    if extension is None:
        assert native_missing() in text
    else:
        assert kdkernels.isa() in text


def test_the_command_prints_table_and_version(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == f"{table()}\n"
    for arguments, status in ((["--version"], 0), (["table"], 2)):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == status
    printed = capsys.readouterr()
    assert printed.out == f"kdkernels {kdkernels.__version__}\n"
    assert "table" in printed.err


def test_a_closed_pipe_ends_the_table_without_a_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "kdkernels"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("level", kdkernels.isa_levels())
def test_the_environment_lowers_the_level(level):
    done = python("import kdkernels; print(kdkernels.isa())", KDKERNELS_ISA=level)
    assert done.stdout.strip() == level


def test_an_unknown_level_is_an_error():
    with pytest.raises(
        ValueError, match="set_isa: level must be one of baseline, v3, v4, got 'v5'"
    ):
        kdkernels.set_isa("v5")


def test_all_names_are_public():
    for name in kdkernels.__all__:
        assert hasattr(kdkernels, name)
