"""The sdist and the wheel made of it, as they lie in a folder of site-packages: they work without the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import harmonica_rt

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("harmonica_rt", "kernels", "train")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"
SMOKE = """
from pathlib import Path
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
import harmonica_rt as hrt
from harmonica_rt.train.pipeline_task import PipelineTask

torch.manual_seed(0)
model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=2,
                              sample_size=8, patch_size=2, num_embeds_ada_norm=1000)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
vae = AutoencoderKL(in_channels=3, out_channels=3, block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
pipe = DiTPipeline(model.eval(), vae.eval(), DDIMScheduler(clip_sample=False))
pipe.set_progress_bar_config(disable=True)

def image():
    return pipe([1], generator=torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images

full = image()
PipelineTask.held_out = 2
learned = hrt.learn(pipe, [1, 2], level="output", target_speedup=1.5, iterations=2, batch=2, validation=2,
                    num_inference_steps=4)
learned.save("learned.json")
assert hrt.Schedule.load("learned.json") == learned and 0 < learned.cur < 1, learned
hrt.compile(pipe, hrt.Schedule.full(model, 4), backend="eager")
np.testing.assert_allclose(image(), full, atol=1e-4)
hrt.compile(pipe, hrt.Schedule.load("learned.json"), backend="eager")
assert np.isfinite(image()).all() and pipe.transformer.report().level == "output"
assert hrt.uncompile(pipe).transformer is model
print(hrt.__file__)
"""


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installer puts there, dependences apart: nothing is asked of the network."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    sdist = python("-c", BUILD, "sdist", str(base), cwd=source)
    with tarfile.open(base / sdist) as archive:
        archive.extractall(base / "unpacked", filter="data")
    (unpacked,) = (base / "unpacked").iterdir()
    wheel = python("-c", BUILD, "wheel", str(base), cwd=unpacked)
    assert wheel == f"harmonica_rt-{harmonica_rt.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(base / wheel) as archive:
        archive.extractall(base / "site")
    return base / "site"


def test_a_wheel_holds_the_package_alone(site: Path) -> None:
    files = {str(file.relative_to(site)) for file in site.rglob("*") if file.is_file()}
    metadata = f"harmonica_rt-{harmonica_rt.__version__}.dist-info"
    assert {name.split("/")[0] for name in files} == {"harmonica_rt", metadata}
    assert {"harmonica_rt/py.typed", "harmonica_rt/train/captions.txt"} <= files
    assert "harmonica=harmonica_rt.train.cli:app" in (site / metadata / "entry_points.txt").read_text().replace(" ", "")


def test_every_module_is_imported_from_where_it_was_installed(site: Path, tmp_path: Path) -> None:
    code = f"""
import importlib, pkgutil, sys
sys.path.insert(0, {str(site)!r})
import harmonica_rt
for part in pkgutil.walk_packages(harmonica_rt.__path__, "harmonica_rt."):
    if part.name != "harmonica_rt.train.__main__":
        importlib.import_module(part.name)
from harmonica_rt.train import models
try:
    models.load("dit-fashion", "ddim")
except FileNotFoundError as error:
    told = error
ours = [m for name, m in sys.modules.items() if name.split(".")[0] == "harmonica_rt"]
assert len(ours) > 40 and all(m.__file__.startswith({str(site)!r}) for m in ours), ours
assert "bench" not in sys.modules and {str(ROOT)!r} not in sys.path, sys.path
print(told)
"""
    assert python("-c", code, cwd=tmp_path) == (
        "model: expected a reference model (none here), a folder or a hub name, got 'dit-fashion'"
    )


def test_a_pipeline_is_learned_on_and_compiled(site: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{SMOKE}"
    assert python("-c", code, cwd=tmp_path) == str(site / "harmonica_rt" / "__init__.py")
