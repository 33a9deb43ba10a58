"""Which module of the package imports which, read from its source: wherever the import stands, also for types alone."""

from __future__ import annotations

import ast
import gc
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"harmonica_rt": "harmonica_rt", "harmonica_rt.kernels": "kernels", "harmonica_rt.train": "train"}


def modules(root: Path = ROOT, folders: dict[str, str] | None = None) -> dict[str, Path]:
    """Every module of the package by its full name.

    Args:
        folders: of a checkout by the package they are; ours unless given.
    """
    found = {}
    for package, folder in (FOLDERS if folders is None else folders).items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


def imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """Of each module, those of `files` that it imports at its top, within functions or under TYPE_CHECKING."""
    return {name: _imports(name, file, files) - {name} for name, file in files.items()}


def _imports(name: str, file: Path, files: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            members = {f"{module}.{alias.name}" for alias in node.names}
            found |= (members & files.keys()) | ({module} if members - files.keys() else set())
    return found & files.keys()


def parsed(file: Path) -> ast.Module:
    """A source's tree.

    Nothing is collected meanwhile: a traceback that is printed then parses too, and Python 3.11 takes both for one
    ("AST constructor recursion depth mismatch").
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    finally:
        if enabled:
            gc.enable()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import one another, directly or by way of others: each such set in order of names."""
    reached = {name: _reached(graph, name) for name in graph}
    sets = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(names) for names in sets if names)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = graph[waiting.pop()] - found
        found |= fresh
        waiting += fresh
    return found
