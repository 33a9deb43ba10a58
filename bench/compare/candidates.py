"""What a frontier is made of: a sampler, its timesteps, and what runs them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import harmonica_rt as hrt
from bench.models import samplers
from bench.models.pipelines import PixelPipeline
from bench.models.reference import REFERENCES
from bench.models.schedule_specs import parse_schedule
from bench.peers import PEERS
from bench.peers.ours import SAMPLERS, SHIPPED

PLAIN, PEER, UNLEARNED, LEARNED = FAMILIES = ("plain sampler", "peers", "ours, unlearned", "ours, learned")
EAGER, WHOLE, OURS = "eager", "compile", "ours"  # beside these, peers by their names
ROOT = SHIPPED.parent.parent
FULL = "full"  # ours, everything computed
GUIDED = ("cond", "uncond")  # at the ends of two files that are learned together
STEPS = (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18)  # of a sampler without reuse
REUSED_STEPS = {  # of a run, and which are computed: every so many, or so many spread over all
    20: ("2", "3", "4", "5", "14of20", "12of20", "10of20", "8of20", "7of20", "6of20", "5of20", "4of20"),
    28: ("2", "3", "4", "6"),
    14: ("2", "3"),
    40: ("10of40", "7of40", "5of40"),
    60: ("10of60", "7of60", "5of60"),
}
FIRST_SPECS = ("branches:{}:1", "blocks:{}:1", "output:{}:1")  # on every sampler; those below on the best
SPECS = (
    *FIRST_SPECS, "branches:{}:2", "blocks:{}:2", "blocks:{}:1:carry=0.5", "output:{}:2",
    "trunk:{}:1", "trunk:{}:2", "trunk:{}:1:carry=0.5",
)  # fmt: skip
GUIDED_SPECS = ("blocks:{}:1:carry=1", "blocks:{}:2:carry=1", "trunk:{}:1:carry=1")  # more of them at strong guidance
STRONG = 3.0
TUNING = {  # a peer's own settings, from cautious to fast
    "taylorseer": tuple(f"order {order}, interval {n}" for n in (2, 3, 4, 5, 6) for order in (1, 2)),
    "cache-dit": tuple(
        [f"{kind} {bound}" for bound in (0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.35)
         for kind in ("DBCache", "DBCache, TaylorSeer")] + [f"mask, TaylorSeer, every {n}" for n in (2, 3, 4, 5, 6)]
    ),
    "smooth-cache": ("0.08", "0.12", "0.16", "0.2", "0.25", "0.3", "0.4", "0.55"),
    "sea-cache": ("0.1", "0.18", "0.25", "0.35", "0.5", "0.75", "1.0"),
    "mag-cache": ("0.03", "0.06", "0.09", "0.12", "0.18", "0.24", "0.4"),
    "first-block": ("0.05", "0.08", "0.12", "0.18", "0.25", "0.35", "0.5"),
    "faster-cache": tuple(f"every {n}" for n in (2, 3, 4, 5, 6)),
    "pyramid": tuple(f"every {n}" for n in (2, 3, 4, 5, 6)),
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """One way to sample a model.

    Attributes:
        sampler, spacing: as in `bench.models.samplers`.
        steps: of a run, those that reuse too.
        by: `EAGER` or `WHOLE` (torch.compile), all computed by diffusers; `OURS`; or a peer of `PEERS`.
        setting: ours: a spec of `schedule_specs` or a schedule's file, those in the repository by their path there, the
            first of two that are learned together; a peer's own.
        digest: of the file, so that a schedule that is learned anew is another candidate.
    """

    sampler: str
    spacing: str
    steps: int
    by: str = EAGER
    setting: str = ""
    digest: str = ""

    @property
    def file(self) -> Path:
        """Of a learned schedule."""
        return ROOT / self.setting  # of an absolute path itself

    def schedule(self, pipeline: PixelPipeline) -> hrt.Schedule | dict[str, hrt.Schedule]:
        """What ours runs, one a context where two are learned together."""
        if not self.learned:
            return parse_schedule(self.setting, pipeline, self.steps)
        own = {context: hrt.Schedule.load(file) for context, file in _files(self.file).items()}
        return own.get("", own)

    @property
    def learned(self) -> bool:
        return self.by == OURS and Path(self.setting).suffix in (".json", ".safetensors")

    @property
    def reuses(self) -> bool:
        return self.by not in (EAGER, WHOLE) and (self.by, self.setting) != (OURS, FULL)

    @property
    def family(self) -> str:
        if self.by == OURS:
            return LEARNED if self.learned else UNLEARNED
        return PLAIN if self.by in (EAGER, WHOLE) else PEER

    @property
    def plain(self) -> Candidate:
        """The same sampler's run without reuse, at its default times where a schedule has its own."""
        own = samplers.default(self.sampler) if self.spacing == samplers.OWN_SIGMAS else self.spacing
        return replace(self.on(EAGER), spacing=own)

    def on(self, by: str, setting: str = "") -> Candidate:
        """The same sampler run by another."""
        return replace(self, by=by, setting=setting, digest="")

    @property
    def name(self) -> str:
        """As tables show it, and as rows are known."""
        run = f"{self.sampler} {self.spacing} {self.steps}"
        if self.by == OURS:
            return f"{run}, {f'{self.file.stem} #{self.digest}' if self.learned else self.setting}"
        if self.by in (EAGER, WHOLE):
            return run if self.by == EAGER else f"{run}, torch.compile"
        return f"{run}, {PEERS[self.by].name}: {self.setting}"


def own(model: str, steps: int = 20) -> Candidate:
    """The reference run."""
    return Candidate(SAMPLERS[model], samplers.default(SAMPLERS[model]), steps)


def plain(model: str, steps: Iterable[int] = STEPS) -> Iterator[Candidate]:
    """Every sampler of the model's kind, each spacing, without reuse."""
    for sampler in samplers.of_same_kind(SAMPLERS[model]):
        for spacing in samplers.spacings(sampler):
            yield from (Candidate(sampler, spacing, n) for n in steps)


def unlearned(bases: Iterable[tuple[str, str]], steps: int, specs: Iterable[str]) -> Iterator[Candidate]:
    """Uniform schedules on samplers and spacings, in `steps`, a key of `REUSED_STEPS`."""
    for sampler, spacing in bases:
        for computed in REUSED_STEPS[steps]:
            yield from (Candidate(sampler, spacing, steps, OURS, spec.format(computed)) for spec in specs)


def specs(model: str) -> tuple[str, ...]:
    """The kinds of schedules that are worth a look on a model."""
    return SPECS + (GUIDED_SPECS if REFERENCES[model].guidance >= STRONG else ())


def learned(model: str, pipeline: PixelPipeline, files: Iterable[Path] = ()) -> tuple[list[Candidate], list[str]]:
    """Those of the shipped files and of `files`, and why others are none.

    Args:
        pipeline: the model's.
    """
    found, refused = [], []
    shipped = sorted(SHIPPED.glob(f"{model}-*.json")) + sorted(SHIPPED.glob(f"{model}-*.safetensors"))
    again = pipeline.around(pipeline.transformer)

    def timesteps(scheduler: object, steps: int) -> list[float]:
        again.scheduler = scheduler
        return again.timesteps(steps)

    for file in (*shipped, *files):
        try:
            own = _files(file)
            if file == own.get(GUIDED[1]):  # it comes with the first
                continue
            schedule, *_ = [hrt.Schedule.load(each) for each in own.values()]
            base = samplers.of_schedule(schedule, pipeline.scheduler.config, SAMPLERS[model], timesteps)
            found.append(Candidate(*base, schedule.steps, OURS, _named(file), _digest(file)))
        except ValueError as error:
            refused.append(f"{file}: {error}")
    return found, refused


def _named(file: Path) -> str:
    whole = file.resolve()
    return (whole.relative_to(ROOT.resolve()) if whole.is_relative_to(ROOT.resolve()) else whole).as_posix()


def _files(file: Path) -> dict[str, Path]:
    """Two that are learned together by context, one alone by ""."""
    for context in GUIDED:
        stem = file.stem.removesuffix(f"-{context}")
        both = {own: file.with_stem(f"{stem}-{own}") for own in GUIDED}
        if stem != file.stem and all(own.is_file() for own in both.values()):
            return both
    return {"": file}


def _digest(file: Path) -> str:
    return hashlib.sha256(b"".join(own.read_bytes() for own in _files(file).values())).hexdigest()[:4]


def tuned(bases: Iterable[tuple[str, str]], steps: int = 20, seed: int = 0) -> Iterator[Candidate]:
    """Peers' settings as a search looks at them: each peer in turn, its settings shuffled, base after base."""
    draw = random.Random(seed)
    for sampler, spacing in bases:
        queues = {
            name: draw.sample(settings, len(settings)) for name, settings in TUNING.items() if not PEERS[name].missing
        }
        while any(queues.values()):
            for name, queue in queues.items():
                if queue:
                    yield Candidate(sampler, spacing, steps, name, queue.pop())


def compiled(candidate: Candidate) -> Candidate | None:
    """The same under torch.compile; None where there is no such peer."""
    if candidate.by == EAGER:
        return candidate.on(WHOLE)
    if (by := f"{candidate.by}-compiled") not in PEERS:
        return None
    return candidate.on(by, candidate.setting)
