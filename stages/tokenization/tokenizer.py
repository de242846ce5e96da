"""Tokenizers: trained on the corpus, read from a file, or taken from the Hugging Face hub.

Whatever its origin, a tokenizer becomes one `tokenizers.Tokenizer` and one tokenizer.json. It never adds special
tokens of its own, and a special token spelt out in a text is encoded as the characters it is made of: the only EOS ids
in the shards are the ones that end documents.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lazypipe.stages.tokenization.sentencepiece_model as sentencepiece_model
from lazypipe.stages.contract import UserError, Warn, file_sha256
from lazypipe.stages.tokenization.config import FileTokenizer, HubTokenizer, TrainTokenizer
from lazypipe.stages.tokenization.documents import cut_into_pieces

TRAINED_EOS = "<|endoftext|>"
USUAL_EOS = (TRAINED_EOS, "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|eos|>", "[EOS]")
_MAX_IDS = {"uint16": 2**16, "uint32": 2**32}
_LOCAL_FILES = ("*.json", "*.model", "*.txt")
# Counting words runs one thread per piece handed over; 64 KiB keep two threads busy on a 1 MB corpus.
_TRAINING_PIECE = 2**16


def train_tokenizer(texts: Iterable[str], vocab_size: int, warn: Warn = warnings.warn) -> Any:
    """A byte-level BPE (GPT-2's pattern, no prefix space) of at most vocab_size tokens, id 0 = <|endoftext|>.

    Deterministic in the texts' content. Text that affords fewer merges gives a smaller vocabulary and a warning.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[TRAINED_EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_pieces(texts), trainer)
    warn_of_small_vocabulary(tokenizer, vocab_size, warn)
    return tokenizer


def warn_of_small_vocabulary(tokenizer: Any, vocab_size: int, warn: Warn) -> None:
    if tokenizer.get_vocab_size() < vocab_size:
        warn(
            f"the training text affords a vocabulary of {tokenizer.get_vocab_size()} tokens, not {vocab_size}; "
            "the smaller one is used"
        )


def load_tokenizer(config: FileTokenizer | HubTokenizer, warn: Warn = warnings.warn) -> tuple[Any, str | None]:
    """(tokenizers.Tokenizer, its own EOS token if it names one). UserError when it cannot be loaded."""
    if isinstance(config, FileTokenizer):
        path = _existing_file(config)
        if path.suffix == ".model":
            tokenizer, own_eos = sentencepiece_model.convert(path, warn), sentencepiece_model.eos_piece(path)
        else:
            tokenizer, own_eos = _from_json_file(path), None
    else:
        tokenizer, own_eos = _from_hub(config)
    # A tokenizer.json may bring the settings of its model's last use, which would shorten or pad documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, own_eos


def find_eos(vocabulary: Iterable[str], special: Iterable[str], wanted: str | None, own: str | None) -> str:
    """The end-of-document token: `wanted`, else the tokenizer's own, else the first usual name it knows. UserError."""
    known = set(vocabulary)
    if wanted is not None and wanted in known:
        return wanted
    candidates = (own, *USUAL_EOS) if wanted is None else ()
    for candidate in candidates:
        if candidate is not None and candidate in known:
            return candidate
    asked = f"tokenizer.eos_token {wanted!r} is not in its vocabulary" if wanted else "no usual EOS token is in it"
    listed = ", ".join(map(repr, sorted(special)[:20])) or "none"
    raise UserError(
        f"the tokenizer has no end-of-document token: {asked}. Its special tokens: {listed}; "
        "name one of them, or another token, in tokenizer.eos_token"
    )


def check_vocabulary(vocab_size: int, token_dtype: str) -> None:
    """UserError when a token id would not fit the dtype of the shards."""
    if vocab_size > _MAX_IDS[token_dtype]:
        raise UserError(
            f"the tokenizer has {vocab_size} token ids, more than token_dtype={token_dtype} holds "
            f"({_MAX_IDS[token_dtype]}); set tokenize.token_dtype: uint32"
        )


def check_tokenizer(config: TrainTokenizer | FileTokenizer | HubTokenizer, token_dtype: str) -> None:
    """Refuse what can be refused without loading a tokenizer: file missing or damaged, no EOS, too many ids."""
    if isinstance(config, TrainTokenizer):
        check_vocabulary(config.vocab_size, token_dtype)
    elif isinstance(config, FileTokenizer):
        path = _existing_file(config)
        if path.suffix == ".model":
            pieces, special = sentencepiece_model.pieces(path)
            find_eos(pieces, special, config.eos_token, sentencepiece_model.eos_piece(path))
            check_vocabulary(len(pieces), token_dtype)
        else:
            vocabulary, special = _vocabulary_of_json(path)
            find_eos(vocabulary, special, config.eos_token, None)
            check_vocabulary(max(vocabulary.values()) + 1, token_dtype)


def tokenizer_identity(config: TrainTokenizer | FileTokenizer | HubTokenizer) -> dict[str, Any]:
    """What of the tokenizer enters the fingerprint besides its config: content hash or commit, never a path."""
    if isinstance(config, FileTokenizer):
        return {"sha256": file_sha256(_existing_file(config))}
    if isinstance(config, HubTokenizer):
        if (folder := Path(config.name)).is_dir():
            return {"files": directory_sha256(folder, _LOCAL_FILES)}
        from lazypipe.stages.data.hub import resolve_commit

        return {"commit": resolve_commit("model", config.name, config.revision)}
    return {}


def directory_sha256(folder: Path, patterns: Iterable[str]) -> str:
    """One hash of the matching files' relative names and contents."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def special_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


def number_of_ids(tokenizer: Any) -> int:
    """One more than the largest token id: the rows an embedding matrix needs."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def joins_pieces_exactly(tokenizer: Any) -> bool:
    """Whether text cut before a line break has the tokens of the whole text, on a sample of such places."""
    samples = (("One line", "\nAnother"), ("Act 2", "\n\n  Enter"), ("word", "\r\n\r\nword"), ("end", "\n"))
    for left, right in samples:
        whole = tokenizer.encode(left + right, add_special_tokens=False).ids
        parts = [tokenizer.encode(text, add_special_tokens=False).ids for text in (left, right)]
        if whole != parts[0] + parts[1]:
            return False
    return True


def _training_pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for piece, _ in cut_into_pieces(text.encode(), _TRAINING_PIECE):
            yield piece.decode()


def _existing_file(config: FileTokenizer) -> Path:
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise UserError(
            f"tokenizer.path: {config.path!r} is not a file; expected a tokenizer.json or a SentencePiece .model"
        )
    return path


def _from_json_file(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"tokenizer.path: {str(path)!r} is not a tokenizer.json of the tokenizers library: {error}"
        ) from None


def _vocabulary_of_json(path: Path) -> tuple[dict[str, int], list[str]]:
    """(token -> id, special tokens) of a tokenizer.json, without the tokenizers library."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]["vocab"]
        # A Unigram vocabulary is a list of [token, score]; the others map token to id.
        vocabulary = dict(model) if isinstance(model, dict) else {entry[0]: i for i, entry in enumerate(model)}
        added = content.get("added_tokens") or []
        vocabulary |= {token["content"]: token["id"] for token in added}
        special = [token["content"] for token in added if token.get("special")]
        if not vocabulary:
            raise ValueError("its vocabulary is empty")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"tokenizer.path: {str(path)!r} is not a tokenizer.json of the tokenizers library ({error!r})"
        ) from None
    return vocabulary, special


def _from_hub(config: HubTokenizer) -> tuple[Any, str | None]:
    """A hub tokenizer, or a local directory in the layout of one, through transformers' AutoTokenizer."""
    from transformers import AutoTokenizer

    revision = config.revision or "main"
    try:
        loaded = AutoTokenizer.from_pretrained(config.name, revision=revision)
    except (OSError, ValueError) as error:
        first = re.split(r"\n", str(error).strip())[0]
        raise UserError(
            f"tokenizer.name: no tokenizer could be loaded from {config.name!r} at revision {revision!r} ({first}); "
            "check the name and the network, or give a local directory or tokenizer.kind: file"
        ) from None
    fast = getattr(loaded, "backend_tokenizer", None)
    if fast is None:
        raise UserError(
            f"tokenizer.name: {config.name!r} loads as {type(loaded).__name__}, which has no fast tokenizer; "
            "choose one with a tokenizer.json"
        )
    return fast, loaded.eos_token
