"""How many bytes of text each token stands for: what turns nats per token into bits per byte."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lazypipe.stages.data.shards import TokenShards

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_byte_counts(tokenizer_json: Path, vocab_size: int) -> npt.NDArray[np.int64]:
    """Bytes of text behind each token id, int64 [vocab_size]; 0 for special tokens and ids without a token.

    Byte-level BPE spells every byte as one character, so a token has as many bytes as characters: exact. SentencePiece
    marks a space by U+2581 and spells a lone byte as <0xAB>: exact but for the space it puts before a text. Others by
    their UTF-8 length.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    byte_level = _mentions(json.loads(tokenizer_json.read_text(encoding="utf-8")), "ByteLevel")
    added = tokenizer.get_added_tokens_decoder()
    counts = np.zeros(vocab_size, dtype=np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index >= vocab_size:
            continue
        if index in added:
            counts[index] = 0 if added[index].special else len(token.encode())
        elif byte_level:
            counts[index] = len(token)
        elif _BYTE_TOKEN.fullmatch(token):
            counts[index] = 1
        else:
            counts[index] = len(token.replace("\u2581", " ").encode())
    return counts


def byte_scale(counts: npt.NDArray[np.int64], shards: TokenShards, text_bytes: int) -> float:
    """text_bytes of the whole split / the bytes the table counts in it: 1 when the table is exact.

    A tokenizer that changes its text (lower-casing, added spaces) makes the table wrong by a few percent; multiplied by
    this, it is right for the split as a whole. Costs one pass over the split.
    """
    counted = 0
    for tokens in shards.pieces():
        counted += int(counts[tokens].sum())
    return text_bytes / counted if counted else 1.0


def _mentions(node: Any, kind: str) -> bool:
    """True when the tokenizer's description holds a component of this type among its pre-tokenizers or decoders."""
    if not isinstance(node, dict):
        return False
    parts = [node.get("pre_tokenizer"), node.get("decoder")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if part.get("type") == kind:
                return True
            parts += part.get("pretokenizers", []) + part.get("decoders", [])
    return False
