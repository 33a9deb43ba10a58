"""What a hard schedule's reused values stand on, as numbers to be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonica_rt.checks import may_carry
from harmonica_rt.forecast import forecast, history
from harmonica_rt.schedule import Schedule

OF_CHANNELS = 0.1  # how far a channel's own deviation goes where a weight goes 1


@dataclass(frozen=True)
class Numbers:
    """A schedule's weights as tensors, whose last dimension but that of channels is images: one each, or 1 for all.

    Attributes:
        weights: [T, entries, order + 1, images].
        carry: [T, entries, images].
        channels: [T, entries, order + 2, images, width], or None; the carry's are the last.
        outputs: [T, order + 1, images].
        output_channels: [T, order + 1, images, channels], or None.
        unlearned: [T, entries, order + 1], the forecast's weights, which a carry stands on.
    """

    weights: Tensor
    carry: Tensor
    channels: Tensor | None
    outputs: Tensor
    output_channels: Tensor | None
    unlearned: Tensor

    def starting_at(self, step: int, unlearned: Tensor) -> Numbers:
        """Those of the steps from `step` on, `unlearned` being the forecast's weights where nothing is kept before."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        cut: dict[str, Any] = {name: value if value is None else value[step:] for name, value in own.items()}
        return Numbers(**cut | {"unlearned": unlearned})

    def rows(self, step: int, entry: int) -> list[Tensor]:
        """Weights of an entry's values, newest first, [images] or [images, width] each."""
        rows = self.weights[step, entry].unbind()
        if self.channels is None:
            return list(rows)
        return [row[:, None] + more for row, more in zip(rows, self.channels[step, entry].unbind())]

    def carry_row(self, step: int, entry: int) -> Tensor:
        """How much of what is new an entry passes on, [images] or [images, width]."""
        row = self.carry[step, entry]
        return row if self.channels is None else row[:, None] + self.channels[step, entry, -1]

    def output_rows(self, step: int) -> list[Tensor]:
        """Weights of kept outputs, newest first, [images] or [images, channels] each."""
        rows = self.outputs[step].unbind()
        if self.output_channels is None:
            return list(rows)
        return [row[:, None] + more for row, more in zip(rows, self.output_channels[step].unbind())]


class ReuseWeights:
    """What a schedule's reused entries and outputs stand on, as changes of the schedule's own weights.

    Args:
        schedule: which values exist at each entry; its weights are the start.
        carry: whether carries are learned, of groups of blocks and the trunk. They stay as they are otherwise.
        width: channels of the streams, to have weights per channel learned too; None for none but the schedule's own.
        entered: steps at which another denoiser goes on, for which no values exist then.

    Attributes:
        change: [n], the changes, 0 at first; to be learned.

    Raises:
        ValueError: `schedule` reuses nothing.
    """

    def __init__(
        self,
        schedule: Schedule,
        device: torch.device | str = "cpu",
        carry: bool = False,
        width: int | None = None,
        entered: Sequence[int] = (),
    ) -> None:
        self.schedule = schedule
        steps, order = schedule.steps, schedule.order
        computed = schedule.compute.reshape(steps, -1)
        begun = np.maximum.accumulate([step if step in entered else 0 for step in range(steps)])
        exists = history(computed, order) >= begun[:, None, None]
        reused = ~(schedule.compute | schedule.left_alone).reshape(steps, -1)
        self.free = exists & reused[..., None]  # [T, entries, values]
        may = may_carry(schedule.compute, schedule.groups, schedule.level).reshape(steps, -1)
        self.carries = reused & may & exists[..., 0]
        output_exists = history(~schedule.output, order) >= begun[:, None]
        output_free = output_exists & schedule.output[:, None]
        parts = [_Part(schedule.weights.reshape(self.free.shape), self.free)]
        parts.append(_Part(schedule.output_weights, output_free))
        parts.append(_Part(schedule.carry.reshape(computed.shape), self.carries & carry))
        if not any(part.free.any() for part in parts):
            raise ValueError("expected a schedule that reuses something, got one that computes everything")
        self.has_channels, self.has_output_channels = (
            schedule.channels is not None,
            schedule.output_channels is not None,
        )
        if width is None and schedule.channels is not None:
            width = schedule.channels.shape[-1]
        if width is not None and computed.shape[1]:
            parts.append(self._channels(width, carry))
            self.has_channels = True
        if schedule.output_channels is not None:
            parts.append(_Part(schedule.output_channels, np.zeros(schedule.output_channels.shape, dtype=bool)))
        self.parts, places, scales, count = parts, [], [], 0
        for part in parts:
            own = np.full(part.free.size, -1)
            own[part.free.reshape(-1)] = count + np.arange(free := int(part.free.sum()))
            places.append(own)
            scales += [OF_CHANNELS if part.start.dtype == np.float32 else 1.0] * free
            count += free
        at = np.concatenate(places)
        self.places = torch.tensor(np.where(at < 0, count, at), device=device)  # the last one is a change of 0
        start = np.concatenate([part.start.reshape(-1) for part in parts], dtype=np.float64)
        self.start = torch.tensor(start, device=device)
        self.scales = torch.tensor(scales, device=device)
        self.change = torch.zeros(count, device=device)
        unlearned = forecast(computed, order, schedule.positions)
        self.unlearned = torch.tensor(unlearned, dtype=torch.float32, device=device)

    def _channels(self, width: int, carry: bool) -> _Part:
        schedule, (steps, entries, values) = self.schedule, self.free.shape
        start = np.zeros((steps, entries, values + 1, width), dtype=np.float32)
        if schedule.channels is not None:
            own = schedule.channels.reshape(steps, entries, -1, width)
            start[:, :, : own.shape[2]] = own
        free = np.concatenate([self.free, (self.carries & carry)[..., None]], axis=-1)
        return _Part(start, np.broadcast_to(free[..., None], start.shape))

    def __call__(self, change: Tensor | None = None) -> Numbers:
        """The weights, differentiable.

        Args:
            change: in place of `change`; [n] (images is 1), or [images, n], each image with its own.
        """
        change = torch.atleast_2d(self.change if change is None else change)
        change = change * self.scales.to(change.dtype)
        change = torch.cat([change, change.new_zeros(len(change), 1)], dim=1)
        flat = self.start.to(change.dtype) + change[:, self.places]
        sizes = [part.free.size for part in self.parts]
        values = [one.reshape(len(change), *part.free.shape) for one, part in zip(flat.split(sizes, 1), self.parts)]
        weights, outputs, carry = (value.movedim(0, -1) for value in values[:3])
        more = [value.movedim(0, -2) for value in values[3:]]
        channels = more.pop(0) if self.has_channels else None
        return Numbers(weights, carry, channels, outputs, more[0] if more else None, self.unlearned)

    def to_schedule(self, change: Tensor | None = None) -> Schedule:
        """The schedule with its weights as they are now, or with `change` [n] in place of theirs."""
        numbers, schedule = self((self.change if change is None else change).detach().double()), self.schedule
        fields = {
            "weights": numbers.weights[..., 0].cpu().numpy().reshape(schedule.weights.shape),
            "carry": numbers.carry[..., 0].cpu().numpy().reshape(schedule.carry.shape),
            "output_weights": numbers.outputs[..., 0].cpu().numpy(),
        }
        if numbers.channels is not None:
            channels = numbers.channels[:, :, :, 0].float().cpu().numpy()
            shape = (*schedule.compute.shape, *channels.shape[2:])
            rows = schedule.order + 1 + may_carry(schedule.compute, schedule.groups, schedule.level).any()
            fields["channels"] = channels.reshape(shape)[..., :rows, :]
        return schedule.replace(**fields)


@dataclass(frozen=True)
class _Part:
    """Some of a schedule's numbers: where they start, and which may change."""

    start: np.ndarray
    free: np.ndarray


def fixed(schedule: Schedule, device: torch.device | str = "cpu") -> Numbers:
    """A schedule's own numbers."""
    computed = schedule.compute.reshape(schedule.steps, -1)

    def tensor(values: np.ndarray, *shape: int) -> Tensor:
        return torch.tensor(values.reshape(shape), dtype=torch.float32, device=device)

    steps, entries, order = schedule.steps, computed.shape[1], schedule.order
    channels = schedule.channels
    if channels is not None:
        channels = channels.reshape(steps, entries, *channels.shape[-2:])
        if channels.shape[2] == order + 1:  # branches have no carry
            channels = np.concatenate([channels, np.zeros_like(channels[:, :, :1])], axis=2)
    outputs = schedule.output_channels
    return Numbers(
        tensor(schedule.weights, steps, entries, order + 1, 1),
        tensor(schedule.carry, steps, entries, 1),
        None if channels is None else tensor(channels, *channels.shape[:3], 1, channels.shape[-1]),
        tensor(schedule.output_weights, steps, order + 1, 1),
        None if outputs is None else tensor(outputs, steps, order + 1, 1, outputs.shape[-1]),
        tensor(forecast(computed, order, schedule.positions), steps, entries, order + 1),
    )


def combined(values: Sequence[Tensor], rows: Sequence[Tensor], axis: int = -1) -> Tensor:
    """The weighted sum of values, in their dtype.

    Args:
        values: alike; their first dimension is images, or a multiple of that: guidance doubles them.
        rows: [images or 1] each, or [images or 1, width] for weights per channel, along `axis` of the values.
    """
    like = values[0]
    total = over(rows[0], like, axis) * like
    for row, value in zip(rows[1:], values[1:]):
        total = torch.addcmul(total, over(row, like, axis), value)
    return total.to(like.dtype)


def over(row: Tensor, like: Tensor, axis: int = -1) -> Tensor:
    """A row of weights, to be multiplied with tensors such as `like`."""
    shape = [1] * like.ndim
    if len(row) > 1:
        if not like.ndim or len(like) % len(row):
            raise ValueError(
                f"weights of {len(row)} images each: expected values over these images, got {list(like.shape)}: learn "
                "on one at a time (accumulate)"
            )
        row = row.repeat(len(like) // len(row), *(1,) * (row.ndim - 1))
        shape[0] = len(row)
    if row.ndim == 2:
        shape[axis] = row.shape[1]
        if like.shape[axis] != row.shape[1]:
            raise ValueError(f"weights per channel: expected {row.shape[1]} channels, got {list(like.shape)}")
    return row.view(shape)


def anything(numbers: Tensor) -> bool:
    """Whether weights are to be multiplied at all: not where they are 0 and nothing learns them."""
    return numbers.requires_grad or bool(numbers.any())
