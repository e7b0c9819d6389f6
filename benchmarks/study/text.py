"""A small transformer, trained from the start to predict the next character of Python's own help texts.

It differs from the LoRA fine-tune in what is trained: all weights of a model from random initial values, embeddings,
norms and biases included, most of them in tensors that are large enough for 8-bit states. The text is what
`help()` prints on Python's topics, so it differs a little from one version of Python to the next.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from .task import Named

_CONTEXT = 64
_WIDTH = 64
_HEADS = 4
_LAYERS = 2
_BATCH = 16
_HELD_OUT_WINDOWS = 128
_HELD_OUT_TOPIC = 10  # every tenth topic is held out


class Block(nn.Module):
    """Causal attention and a network of two layers, each beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, characters, width) to the same."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, _HEADS, _WIDTH // _HEADS)).transpose(1, 3)
        queries, keys, values = heads.unbind(2)
        attended = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Predicts the next character of a text.

    Args:
        characters: number of different characters.
    """

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(characters, _WIDTH), nn.Embedding(_CONTEXT, _WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(_LAYERS)))
        self.norm, self.head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, characters)

    def forward(self, windows: Tensor) -> Tensor:
        """The loss on windows (batch, _CONTEXT + 1) of character numbers, 0-d."""
        x = self.characters(windows[:, :-1]) + self.positions.weight
        scores = self.head(self.norm(self.blocks(x)))
        return nn.functional.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())


class Text:
    """The model and its text.

    Args:
        seed: of the initial weights and of the batches.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._train, held_out, characters = _texts()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._model = Model(characters)
        self._held_out = _windows(held_out, torch.linspace(0, len(held_out) - _CONTEXT - 1, _HELD_OUT_WINDOWS).long())

    def named_parameters(self) -> Named:
        """All weights."""
        return list(self._model.named_parameters())

    def loss(self, number: int) -> Tensor:
        """The loss of a batch of windows anywhere in the text."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        starts = torch.randint(len(self._train) - _CONTEXT, (_BATCH,), generator=generator)
        return self._model(_windows(self._train, starts))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The loss on windows spread over the held-out topics."""
        return self._model(self._held_out).item()


@cache
def _texts() -> tuple[Tensor, Tensor, int]:
    """The text to train on and the held-out text, as numbers of characters, and the number of different characters."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    alphabet = {character: number for number, character in enumerate(sorted({c for t in topics.values() for c in t}))}
    held_out = set(names[::_HELD_OUT_TOPIC])
    train, other = (
        torch.tensor([alphabet[c] for name in names if (name in held_out) == is_held_out for c in topics[name]])
        for is_held_out in (False, True)
    )
    return train, other, len(alphabet)


def _windows(text: Tensor, starts: Tensor) -> Tensor:
    """Pieces of a text, (starts, _CONTEXT + 1)."""
    return text[starts.unsqueeze(1) + torch.arange(_CONTEXT + 1)]
