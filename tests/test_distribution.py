"""The source distribution: its files, a wheel built from it, and the console commands."""

import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import ROOT


def listed(folder) -> set[str]:
    """The files that setuptools puts into the sdist."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return set((folder / "kdkernels.egg-info" / "SOURCES.txt").read_text().splitlines())


def test_the_sdist_holds_every_source_of_the_build_and_every_recipe(tmp_path):
    files = listed(tmp_path)
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_file()}
    recipes = {str(path.relative_to(ROOT)) for path in ROOT.glob("kdtrain/recipes/**/*.yaml")}
    assert len(sources) > 20
    assert sources | recipes | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= files


@pytest.mark.prove
def test_a_wheel_builds_from_the_sdist_with_the_native_kernels(tmp_path):
    folder = str(tmp_path)
    command = [sys.executable, "setup.py", "egg_info", "--egg-base", folder, "sdist", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(sdist)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    (commands,) = (archive.read(name) for name in names if name.endswith("entry_points.txt"))
    assert b"kdtrain = kdtrain.__main__:main" in commands
    assert any(name.startswith("kdkernels/_native") for name in names)
    assert "kdtrain/recipes/demo/cls_student.yaml" in names


def test_the_console_commands_are_functions():
    from importlib import import_module

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["scripts"]) == {"kdtrain", "kdkernels"}
    module, _, name = project["scripts"]["kdtrain"].partition(":")
    assert callable(getattr(import_module(module), name))
