"""How close a schedule's images are to the full run's, from the same noise: PSNR on a trained reference model.

    python bench/run_quality.py --count 64 --frechet 2000
    python bench/run_quality.py --schedule learned.json --twins --target converged --guidance 3 --classes 0,1,2
    python bench/run_quality.py --model pixart-emoji --schedule bench/schedules/pixart-emoji-dpmsolver++20-3x.json

Fewer steps of the same sampler is the baseline to beat. CUR counts what is skipped of the full run's branches. With
``--frechet``, the images are also compared as a set, by a classifier's features: see `bench.measure.frechet`.
``--twins`` shows what learned reuse weights bring over the forecast's; ``--target converged`` counts the sampler's own
error too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import torch
from rich.console import Console
from rich.table import Table

from bench.arguments import positive
from bench.compare import comparison, peers_page
from bench.measure.quality import FEWER, MODEL, PSNR, TARGETS, measure
from bench.models.reference import TRAINED
from bench.peers import PEERS
from harmonica_rt.train import models

NAMES = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM-Solver++",
    "FlowMatchEulerDiscreteScheduler": "Euler",
}
SCHEDULES = ("uniform:2:0", "uniform:2:1", "uniform:3:0", "uniform:3:1", "uniform:4:0", "uniform:4:1")
JUDGED = {"dit-fashion": 400, "pixart-emoji": 128, "flux-emoji": 128}  # images: for Fréchet, for the nearest glyph


def _seeds(result: dict[str, Any]) -> str:
    first, last = result["seed"], result["seed"] + result["seeds"] - 1
    return f"{first}" if first == last else f"{first} to {last} each"


def table(result: dict[str, Any]) -> Table:
    caption = "mean: over images; pooled: of the error over all images; uniform:N:ORDER"
    if result["frechet"]:
        caption += (
            f"\nFréchet: distance of {result['frechet']} images to the real ones, "
            "and to the full run's from other noises (its own row: chance)"
        )
    gains = any("gain" in row for row in result["rows"])
    if gains:
        caption += "\ngain: of the mean, over the same schedule with the forecast's weights"
    sampler = result["sampler"]
    guidance = f"guidance {result['guidance']:g}" if result["guidance"] > 1 else "no guidance"
    some = "" if result["classes"] is None else f", classes {', '.join(map(str, result['classes']))}"
    out = Table(
        title=f"{result['model']}, {NAMES.get(sampler, sampler)} {result['steps']}, {guidance}{some}: "
        f"PSNR to {TARGETS[result['target']]}, dB ({result['count']} noises, seed {_seeds(result)})",
        caption=caption,
    )
    out.add_column("")
    columns = ["CUR %", "theoretical", *PSNR, *(["gain"] if gains else [])]
    columns += ["means by seed"] if result["seeds"] > 1 else []
    for column in columns + (["Fréchet (real)", "Fréchet (full run)", "class acc. %"] if result["frechet"] else []):
        out.add_column(column, justify="right")
    for row in result["rows"]:
        cells = [f"{100 * row['cur']:.0f}", f"{row['theoretical']:.2f}x"]
        cells += ["" if row[key] is None else f"{row[key]:.1f}" for key in PSNR]
        if gains:
            cells.append(f"{row['gain']:+.1f}" if "gain" in row else "")
        if result["seeds"] > 1:
            cells.append("" if row["by_seed"] is None else f"{min(row['by_seed']):.1f} to {max(row['by_seed']):.1f}")
        if result["frechet"]:
            cells += [f"{row['frechet_real']:.2f}", f"{row['frechet_full']:.2f}", f"{100 * row['class_accuracy']:.1f}"]
        out.add_row(row["name"], *cells)
    return out


def _classes(text: str) -> tuple[int, ...]:
    """An argparse type."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"expected class labels with commas, got {text!r}")
    return tuple(map(int, parts))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schedule", action="append", help="as run_latency's; may be repeated")
    parser.add_argument("--target", choices=TARGETS, default="full", help="what PSNR is taken to")
    parser.add_argument("--model", choices=TRAINED, default=MODEL)
    parser.add_argument("--sampler", choices=models.SAMPLERS, help="unless given, the model's own")
    parser.add_argument("--guidance", type=float, help="1 turns guidance off; unless given, the model's own")
    parser.add_argument("--classes", type=_classes, metavar="I,J,...", help="labels to sample in turn; default: all")
    parser.add_argument("--twins", action="store_true", help="learned schedules also with the forecast's weights")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--count", type=positive, default=64, help="noises")
    parser.add_argument("--frechet", type=int, default=0, metavar="N", help="images a row for its distance; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="seeds from --seed on")
    parser.add_argument("--fewer", type=int, action="append", help="steps of a shorter run to compare; 0: none")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peers", metavar="A,B,...", help=f"compare with peers instead: all, or of {', '.join(PEERS)}")
    parser.add_argument("--judged", type=int, metavar="N", help="peers: images a row to judge as a set; 0: none")
    parser.add_argument("--quick", action="store_true", help="peers: 3 minutes, few noises and one setting each")
    parser.add_argument("--out", type=Path, default=Path("out"), help="peers: folder of their results; a run goes on")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="peers: the page to write; OUT/RESULTS.md unless given"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(width=160)
    if arguments.peers is not None:
        return _peers(arguments, sys.argv[1:] if argv is None else argv, console)
    with console.status("") as status:
        try:
            result = measure(
                tuple(arguments.schedule or SCHEDULES),
                model=arguments.model,
                steps=arguments.steps,
                count=arguments.count,
                seed=arguments.seed,
                seeds=arguments.seeds,
                fewer=FEWER if arguments.fewer is None else tuple(n for n in arguments.fewer if n > 0),
                frechet=arguments.frechet,
                target=arguments.target,
                sampler=arguments.sampler,
                guidance=arguments.guidance,
                classes=arguments.classes,
                twins=arguments.twins,
                progress=status.update,
            )
        except (ValueError, TypeError) as error:
            console.print(f"[red]error:[/red] {error}", soft_wrap=True)
            return 2
    console.print(table(result))
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _peers(arguments: argparse.Namespace, argv: list[str], console: Console) -> int:
    """Ours and peers on the model; the rows in a file, the page beside it."""
    every = [name for name in PEERS if not (arguments.quick and name.endswith("compiled"))]  # compiling takes minutes
    names = every if arguments.peers == "all" else arguments.peers.split(",")
    if arguments.quick:
        job = {"count": 8, "rounds": 3}
    else:
        judged = JUDGED[arguments.model] if arguments.judged is None else arguments.judged
        job = {"count": arguments.count, "judged": judged}
    out, quick, threads = arguments.out, "-quick" if arguments.quick else "", arguments.threads
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"peers-{arguments.model}{f'-{threads}threads' if threads > 1 else ''}{quick}.jsonl"
    command = f"python bench/run_quality.py {shlex.join(argv)}"
    with console.status("") as status:
        try:
            if arguments.frechet:
                raise ValueError(f"--frechet: with --peers expected --judged instead, got {arguments.frechet}")
            if unknown := sorted(set(names) - set(PEERS)):
                raise ValueError(f"--peers: expected all or some of {', '.join(PEERS)}, got {', '.join(unknown)}")
            job = comparison.Job(arguments.model, arguments.steps, threads=threads, **job)
            chosen = {name: PEERS[name] for name in names}
            rows = comparison.compare(job, file, chosen, 1 if arguments.quick else None, command, status.update)
        except (ValueError, OSError) as error:  # a full disk too
            console.print(f"[red]error:[/red] {error}", soft_wrap=True)
            return 2
        except KeyboardInterrupt:
            console.print(f"stopped; every finished row is in {file}, and the same command goes on", soft_wrap=True)
            return 130
    files = sorted(path for path in out.glob("peers-*.jsonl") if bool(quick) == path.stem.endswith("-quick"))
    page = out / "RESULTS.md" if arguments.page is None else arguments.page
    peers_page.write(files, page)
    console.print(peers_page.table(rows), highlight=False, markup=False, soft_wrap=True)
    console.print(peers_page.failures(rows), highlight=False, markup=False, soft_wrap=True)
    console.print(f"written: {file}, its pictures beside it, and {page}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
