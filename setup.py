"""Builds kdkernels._native with ninja; everything declarative is in pyproject.toml.

A machine without a C++ compiler installs the package without the extension, and the reason is
written into kdkernels/_build_info.py, which `python -m kdkernels` prints. A compile error of our
sources fails the build.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# GCC 12 finds maybe-uninitialized in its own AVX-512 headers.
COMMON = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Wno-maybe-uninitialized"
)
# Instruction-set levels, highest first: (namespace, compiler flags, macro that tells dispatch it
# exists).
LEVELS = [
    ("v4", "-march=x86-64-v4 -mprefer-vector-width=512", "KDK_HAVE_V4"),
    ("v3", "-march=x86-64-v3", "KDK_HAVE_V3"),
    ("base", "", ""),
]


def find_compiler():
    """The C++ compiler of $CXX, or the first of c++, g++, clang++; None where there is none."""
    for name in filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]):
        found = shutil.which(name.split()[0])
        if found:
            return found
    return None


def accepts(compiler, flags, source="int main() { return 0; }\n"):
    """Whether the compiler takes these flags."""
    command = [compiler, *flags.split(), "-x", "c++", "-", "-fsyntax-only"]
    return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


class NinjaBuild(build_ext):
    """Compiles csrc/ in parallel: launchers once, every <op>.inc once per instruction-set level."""

    def run(self):
        compiler = find_compiler()
        reason = (
            "" if compiler else "no C++ compiler was found when kdkernels was installed (set CXX)"
        )
        if compiler and not accepts(compiler, COMMON, "#include <cstdint>\nint main() {}\n"):
            reason = f"the C++ compiler {compiler} could not compile an empty C++17 program"
        if reason:
            print(f"kdkernels: building without native kernels: {reason}", file=sys.stderr)
        else:
            super().run()
        self.write_build_info(reason)

    def write_build_info(self, reason):
        target = ROOT / "kdkernels" if self.inplace else Path(self.build_lib) / "kdkernels"
        target.mkdir(parents=True, exist_ok=True)
        text = '"""Written by setup.py: why this installation has no native kernels."""\n\n'
        (target / "_build_info.py").write_text(text + f"NATIVE_MISSING = {reason!r}\n")

    def get_outputs(self):
        # A skipped extension leaves no file behind; an editable install would list it otherwise.
        return [path for path in super().get_outputs() if Path(path).exists()]

    def build_extension(self, ext):
        compiler = find_compiler()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(self.ninja_file(compiler, output))
        ninja = shutil.which(
            "ninja", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"
        )
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        subprocess.run([*command, "-C", str(build)], check=True)

    def ninja_file(self, compiler, output):
        """The build graph. Header dependencies are tracked by ninja, so a rebuild compiles what
        changed."""
        import pybind11

        def quote(path):
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        openmp = "-fopenmp" if accepts(compiler, "-fopenmp") else ""
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        levels = [
            (name, flags, macro)
            for name, flags, macro in LEVELS
            if name == "base" or (is_x86 and accepts(compiler, flags))
        ]
        macros = " ".join(f"-D{macro}" for _, _, macro in levels if macro)
        include = f"-I{quote(pybind11.get_include())} -I{quote(sysconfig.get_path('include'))}"
        link = "-shared" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
        lines = [
            f"cxx = {quote(compiler)}",
            f"flags = {COMMON} {openmp} {macros}",
            "rule compile",
            "  command = $cxx $flags $extra -MMD -MF $out.d -x c++ -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = CXX $out",
            "rule link",
            f"  command = $cxx {link} $in {openmp} -o $out",
            "  description = LINK $out",
        ]
        objects = []
        for source in sorted(CSRC.glob("*.cpp")):
            extra = include if source.name == "module.cpp" else ""
            objects.append((f"{source.stem}.o", source, extra))
        for source in sorted(CSRC.glob("*.inc")):
            for name, flags, _ in levels:
                extra = f"{flags} -DKDK_LEVEL={name}"
                objects.append((f"{source.stem}.{name}.o", source, extra))
        for name, source, extra in objects:
            lines += [f"build {name}: compile {quote(source)}", f"  extra = {extra}"]
        names = " ".join(name for name, _, _ in objects)
        lines += [f"build {quote(output)}: link {names}", f"default {quote(output)}", ""]
        return "\n".join(lines)


setup(
    ext_modules=[Extension("kdkernels._native", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
