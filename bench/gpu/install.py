"""Install the wheels beside this file into a folder, pip alone: ours, diffusers, and others that are not there yet."""

import importlib.metadata
import pathlib
import subprocess
import sys


def missing(wheel):
    name = wheel.name.split("-")[0]
    if name in ("harmonica_rt", "diffusers"):
        return True
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def main(site):
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"expected Python 3.11 to 3.13, got {sys.version.split()[0]}: set PYTHON")
    here = pathlib.Path(__file__).resolve().parent
    wheels = [str(wheel) for wheel in sorted((here / "wheels").glob("*.whl")) if missing(wheel)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-warn-script-location",
    ]
    return subprocess.run([*command, "--upgrade", "--target", site, *wheels], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
