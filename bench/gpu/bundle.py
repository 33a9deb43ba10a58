"""A folder that runs `bench/run_gpu.py` on a machine with a GPU and no network: make gpu-bundle.

It holds our wheel, diffusers and what diffusers needs beyond the packages a CUDA image has, bench/, and `run.sh`, which
installs the wheels into a folder of their own and runs every stage within a budget.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGE = ("torch", "triton", "transformers", "accelerate", "safetensors", "huggingface_hub", "typer", "rich", "tqdm")
IMAGE += ("matplotlib", "numpy")  # what is there already, with all that these need
LIMIT = 40 * 2**20
TRAINED = tuple(folder.parent.name for folder in (ROOT / "bench" / "models").glob("*/training.json"))
NOT_OF_BENCH = (*TRAINED, "results", "schedules", "suites", "h100", "h200", "__pycache__")
REHEARSAL = ("tests/__init__.py", "tests/emulator.py")  # what --dry-run takes for CUDA's graphs
STARTERS = ("run.sh", "install.py")  # of this folder
# Pure Python, whatever the version over there
PURE = ("--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none", "--python-version=3.11")


def required(names: Iterable[str]) -> set[str]:
    """Distributions that `names` need, themselves included, as installed here."""
    from packaging.requirements import Requirement

    todo, found = list(names), set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # another platform's
        found.add(name)
        parsed = map(Requirement, needs)
        todo += [each.name for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


def build(folder: Path) -> int:
    """Make `folder` anew. Returns its size in bytes.

    Raises:
        RuntimeError: it is larger than it may be.
    """
    for stale in (folder, ROOT / "build"):
        shutil.rmtree(stale, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT))
    for name in sorted(required(["diffusers"]) - required(IMAGE)):
        pinned = f"{name}=={importlib.metadata.version(name)}"
        pip("download", "--no-deps", *PURE, "--dest", str(wheels), pinned)
    shutil.copytree(ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns(*NOT_OF_BENCH))
    for name in REHEARSAL:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    (folder / "bench" / "COMMIT").write_text(commit.stdout.strip() + "\n", encoding="utf-8")
    for name in STARTERS:
        shutil.move(folder / "bench" / "gpu" / name, folder / name)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LIMIT:
        raise RuntimeError(f"{folder}: expected at most {LIMIT} bytes, got {size}")
    return size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu-bundle"))
    arguments = parser.parse_args(argv)
    size = build(arguments.out)
    print(f"{arguments.out}: {size / 2**20:.1f} MiB; over there: ./run.sh SECONDS")
    return 0


if __name__ == "__main__":
    sys.exit(main())
