"""What stands where a pipeline has its transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Wrapper(nn.Module):
    """`model`, to a pipeline.

    Attributes:
        context: name of the pipeline's call within a step that is under way; None where it names none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.context = model, None
        self.config, self.dtype, self.device = model.config, model.dtype, model.device

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """As CacheMixin's; FluxPipeline enters one around each call of its transformer."""
        self.context = name
        try:
            with self.model.cache_context(name, **where):
                yield
        finally:
            self.context = None
