"""The imports of a source file, read without running it."""

import ast
from pathlib import Path


def imports(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, as absolute dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    return {
        m for m in imports(path) if m.split(".")[0] in ("kdkernels", "kdtrain", "tests", "bench")
    }
