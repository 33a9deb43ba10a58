"""The schedule: for every step and entry of a denoiser, compute or reuse. Static, immutable."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

from . import builders, hub, imports, resampling, router_files, schedule_files, schedule_text, theory
from .decisions import Decisions

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn


class Schedule(Decisions):
    """Which entries a sampler computes at which step, and what stands in for those it reuses.

    Immutable, and equal by value; `print` shows a row a step. Made by `uniform`, `load`, `from_hub`, of another
    method's file, or from arrays: two branches of a three-layer model, computed at steps 0 and 2 of 4::

        compute = np.zeros((4, 3, 2), dtype=bool)
        compute[[0, 2]] = True
        Schedule(compute, model="DiTTransformer2DModel", branches=("attn", "mlp"))

    Args:
        compute: bool, True where the entry is computed: [T, L, B] of one group, [T, entries] of several, group after
            group, a layer's branches side by side. Step 0 (pure noise) must compute everything. May be left out at
            level output, where there are no entries.
        model: class name of the model it was made for, e.g. ``"DiTTransformer2DModel"``.
        branches: names of the B branches of a layer, in the order they run: short for one group of that many layers in
            ``transformer_blocks``.
        level: what an entry is: ``"branches"``, a residual function of a block; ``"blocks"``, the stream after a group
            of consecutive blocks; ``"output"``, the model's output, which `output` decides about.
        groups: (name, layers, branches) each, e.g. ``("transformer_blocks", 19, ("attn", "mlp"))``; at level blocks
            ``("trunk", 1, ("blocks",))`` or, for a list split into 8, ``("transformer_blocks", 8, ("blocks",))``. At
            level branches ``("trunk", 1, ("blocks",))`` may stand behind the others: the stream after the last branch
            is an entry too. It is computed where the branches run, computed or reused; a step that reuses it leaves
            them alone.
        order: number of cached values a reused entry may stand on, minus one: 0, 1 or 2.
        weights: reuse weights, float, shaped as `compute` with [order + 1] behind, newest value first; 0 where computed
            and for values that do not exist yet. The forecast's unless given.
        carry: of groups of blocks and the trunk, float shaped as `compute`: if reused they are
            sum a_k h_k + carry (x - sum w_k x_k), with x and h the stream before and after them, a their weights, w the
            forecast's. 0 keeps the stream, 1 the residual. 0 where computed, and everywhere unless given.
        channels: weights per channel, float32, shaped as `compute` with [order + 1, width] behind, where there may be
            carries [order + 2, width], the carry's last: what each channel's weight is more than `weights` and `carry`
            say. 0 where these must be 0. None unless given.
        output: bool [T], True for steps that run nothing of the model and return a weighted sum of its last computed
            outputs. None of their entries is computed. No step unless given.
        output_weights: float [T, order + 1], newest output first; 0 for other steps. The forecast's unless given.
        output_channels: float32 [T, order + 1, channels of the output], likewise for `output_weights`.
        sampler: class name of the scheduler it was made for.
        timesteps: the T timesteps of that sampler in the order they run, e.g. ``scheduler.timesteps``. A pipeline tells
            them by itself; a model in a loop of your own is faster, and checked, if the schedule has them.
        log_snr: the T log-SNRs there, as `harmonica_rt.forecast.log_snr` tells them.
        forecast: what the forecast extrapolates over, ``"index"`` of the step, ``"timestep"`` or ``"logsnr"``.
        guidance_scale: classifier-free guidance it was made for.
        note: how it was made.

    Raises:
        TypeError, ValueError: naming what was expected and what came.
    """

    __slots__ = ()

    # ---- builders

    @classmethod
    def full(cls, model: nn.Module, steps: int, **fields: Any) -> Self:
        """Everything computed at every step. `fields` are further arguments of `uniform`."""
        return cls.uniform(model, steps, every=1, **fields)

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        steps: int,
        every: int | None = None,
        order: int = 1,
        *,
        computed: int | None = None,
        level: str = "auto",
        groups: int = 1,
        trunk: bool = False,
        carry: float | None = None,
        **fields: Any,
    ) -> Self:
        """Everything computed at steps 0, `every`, 2 `every`, ..., everything reused between (FORA; order 1 forecasts).

        Args:
            model: the diffusers model (only its class, lists of blocks and branches are read).
            steps: number of denoiser calls of the sampler, T.
            every: 2 unless given.
            computed: in place of `every`: how many steps are computed, spread over all. Steps that reuse the output or
                the trunk's stream cost next to nothing, so 10 can carry a sampler of 60 (`bench/MORE_STEPS.md`).
            level: ``"branches"`` for models with an adapter, ``"blocks"`` for those with lists of blocks, ``"output"``
                for any; ``"auto"`` is the first of these that the model can have, branches for DiT and PixArt alone and
                not where `computed` is given.
            groups: at level blocks, how many groups each list of blocks is split into; 1 is one group for all lists.
            trunk: at level branches, the trunk is an entry beside them, and it is what the steps between reuse.
            carry: of the reused trunk or groups. Unless given 1 for several groups, and for the trunk 0, or 0.5 where
                `guidance_scale` is at least 3 and the order not 0 (`bench/README.md`, which level for whom).
            fields: further arguments of the constructor (sampler, timesteps, note, ...).

        Raises:
            UnsupportedModelError: the model cannot have that level; the message says which it can.
            TypeError, ValueError: an argument is none, or does not go with another.

        Example::

            Schedule.uniform(pipe.transformer, steps=28, every=2)  # every second step
            Schedule.uniform(pipe.transformer, steps=60, computed=10, order=2, level="blocks")  # 10 of 60
        """
        return builders.uniform(cls, model, steps, every, computed, order, level, groups, trunk, carry, fields)

    @classmethod
    def from_router(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        method: str = "harmonica",
        tau: float = 0.1,
        **fields: Any,
    ) -> Self:
        """Read a published router checkpoint without running what it pickles.

        An entry is computed iff sigmoid(logit) > `tau`. ``"l2c"``: of the papers' step numbers k = T-1-i only the even
        ones may reuse, the others compute whatever their logits say. Step 0 always computes.

        Args:
            path: a torch file holding ``{"routers": {"<k>.prob": [layers * branches] logits, ...}, ...}``.
            model: the diffusers model whose layers and branches it must match.
            method: ``"harmonica"`` or ``"l2c"``.
            tau: from 0 to 1; what is above it is computed.
            fields: further arguments of the constructor.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it is no router for the model.
        """
        return router_files.from_router(cls, path, model, method, tau, fields)

    @classmethod
    def from_mask(
        cls, mask: Any, model: nn.Module, level: str = "blocks", order: int = 0, carry: float = 1.0, **fields: Any
    ) -> Self:
        """All of `model` computed at the steps where `mask` is 1, reused at those where it is 0.

        Args:
            mask: a digit a step as text, ``"1101 0100"``, or [T] numbers; step 0 is 1.
            level: ``"blocks"``, one group of all blocks, or as in `uniform`.
            order: as in the constructor; 0 is the last value itself.
            carry: of reused groups; 1 keeps what they add, as other caches do.
            fields: further arguments of the constructor.

        Raises:
            ValueError, UnsupportedModelError: it is no mask, or the model cannot have that level.
        """
        return imports.from_mask(cls, mask, model, level, order, carry, fields)

    @classmethod
    def from_ecad(cls, path: str | os.PathLike[str], model: nn.Module, **fields: Any) -> Self:
        """Read a schedule of ECAD's: of PixArt the branches, of Flux the blocks, computed if a component of one is.

        Args:
            path: a JSON file with ``{"cache_schedule": {"schedule": {"<step>": {"<block>": {component: bool}}}}}``.
            model: the diffusers model that it is for.
            fields: further arguments of the constructor.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it is none of ECAD's for the model.
        """
        return imports.from_ecad(cls, path, model, fields)

    @classmethod
    def from_smoothcache(cls, path: str | os.PathLike[str], model: nn.Module, **fields: Any) -> Self:
        """Read a schedule of SmoothCache's, at level branches; what it does not list is computed.

        Args:
            path: a JSON file with ``{"<component>" or "<component>-<layer>": [1 (computed) or 0, a step each]}``.
            model: the diffusers model that it is for.
            fields: further arguments of the constructor.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it is none of SmoothCache's for the model.
        """
        return imports.from_smoothcache(cls, path, model, fields)

    # ---- changed copies

    def starting_at(self, step: int) -> Self:
        """What is left of the plan for a run that enters at `step` with nothing cached yet (image to image).

        Its step 0 computes everything. Entries whose cached values are the same keep their weights; the others, whose
        history has changed, take the forecast's.

        Raises:
            ValueError: there is no such step.
        """
        return resampling.starting_at(self, step)

    def between(self, steps: int, **fields: Any) -> Self:
        """This plan for a run of `steps` steps: every entry computed as often, at the same places of the run.

        Weights are the forecast's, timesteps gone, unless given: `fields` are as in `replace`. Carries come along, but
        a learned schedule's, which fit its weights: it has those of `uniform` then, and order 1 at most.

        Raises:
            ValueError: `steps` is no positive integer, or a field does not fit.
        """
        return resampling.between(self, steps, fields)

    def beside_branches(self, model: nn.Module) -> Self:
        """This plan at level output, or of one group at level blocks, the same reuse, for a model that can have level
        branches.

        Computed steps then run as that level does: fused, 1.4 times as fast on pixart-emoji. What was one group is an
        entry beside the branches, the trunk.

        Raises:
            ValueError, UnsupportedModelError: it is of another level or model, or `model` cannot have that level.
        """
        return builders.beside_branches(self, model)

    # ---- cost, files and pictures

    def speedup(
        self,
        model: nn.Module,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        context: int | None = None,
    ) -> float:
        """Theoretical speed-up: MACs of the full run / MACs with this schedule, everything the forward does counted.

        Args:
            model: the diffusers model the schedule is for.
            height, width: size of the model's input; its ``config.sample_size`` unless given.
            batch: samples a call; every MAC of a transformer is per sample, so the ratio does not depend on it.
            context: tokens of a prompt, for a model that reads text; PixArt-alpha's 120 unless given.

        Raises:
            UnsupportedModelError: a model without an adapter: its MACs are counted as it runs, `report()` tells them.
        """
        return theory.speedup(self, model, height, width, batch, context)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file a person can read and diff: one row of 0/1 text per step.

        Weights per channel need the name of a ``.safetensors`` file; that text is its metadata. A file of that name is
        replaced once the new one is whole.

        Raises:
            FileNotFoundError, ValueError: there is no such folder, or a ``.json`` cannot hold weights per channel.
        """
        schedule_files.write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by `save`. Nothing in it is run.

        Raises:
            FileNotFoundError: there is none. ValueError: it is no schedule, naming the file and what is wrong with it.
        """
        return schedule_files.read(cls, path)

    def push_to_hub(
        self, repo: str, filename: str | None = None, revision: str | None = None, token: str | bool | None = None
    ) -> str:
        """Commit what `save` writes to a repository of the Hub, made if need be, and its figures to the card there.

        Args:
            repo: ``"user/name"``.
            filename: there; ``schedule.json``, or ``.safetensors`` with weights per channel, unless given.
            revision: a branch; the main one unless given.
            token: as huggingface_hub takes it; the one a login left unless given.

        Returns:
            The commit's address.

        Raises:
            FileNotFoundError, PermissionError: the token may not see the repository, or not write to it.
        """
        return hub.push(self, repo, filename, revision, token)

    @classmethod
    def from_hub(cls, repo: str, file: str, revision: str | None = None, token: str | bool | None = None) -> Self:
        """`load` of a file in a repository of the Hub.

        Args:
            repo: ``"user/name"``; revision: a branch, tag or commit; token: as in `push_to_hub`.
            file: its name there, which ends in ``.json`` or ``.safetensors``.

        Raises:
            FileNotFoundError: repository, revision or file is not there, or offline not in the cache. ValueError: the
                file is no schedule. ConnectionError: the Hub's answer broke off.
        """
        return hub.pull(cls, repo, file, revision, token)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Heatmap, steps across by layers up, one panel a branch, dark where computed; written to `path` if given.

        Learned weights have a second row: how far the newest value's weight is from the forecast's.
        """
        from .plotting import plot_schedule  # imports matplotlib

        return plot_schedule(self, path)

    def __repr__(self) -> str:
        return f"<Schedule {schedule_text.headline(self)}>"

    def __str__(self) -> str:
        return schedule_text.page(self)
