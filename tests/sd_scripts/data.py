"""A captioned image and a tokenizer, made on the spot, in the folders where sd-scripts looks for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
from PIL import Image
from sklearn.datasets import load_digits


def make_data(folder: Path) -> list[str]:
    """Write both.

    Returns:
        sd-scripts' options that name them, and those that every run here shares.
    """
    images = folder / "data" / "8_digit"
    images.mkdir(parents=True)
    digit = (load_digits().images[0] * 16).clip(0, 255).astype(numpy.uint8)
    Image.fromarray(digit).resize((64, 64)).convert("RGB").save(images / "0.png")
    (images / "0.txt").write_text("a digit", "utf-8")
    for name in ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"):
        _make_tokenizer(folder / "tokenizers" / name)
    return [
        "--pretrained_model_name_or_path", "none", "--tokenizer_cache_dir", str(folder / "tokenizers"),
        "--train_data_dir", str(folder / "data"), "--resolution", "64,64", "--cache_latents", "--seed", "1",
        "--max_data_loader_n_workers", "0", "--output_name", "a", "--network_dim", "4", "--network_alpha", "4",
    ]  # fmt: skip


def _make_tokenizer(folder: Path) -> None:
    """CLIP's, without merges: every letter is a token, alone and at a word's end."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    vocabulary |= {letter + "</w>": 256 + number for number, letter in enumerate(letters)}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    end = "<|endoftext|>"
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
        "eos_token": end, "unk_token": end, "pad_token": end,
    }  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
