"""What planning asks about a TokenizeConfig: paths, vocabulary, disk space. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import UserError
from lazypipe.stages.data.paths import absolute, absolute_directory
from lazypipe.stages.data.remote import is_uri
from lazypipe.stages.data.source_files import looks_like_a_path
from lazypipe.stages.data.sources import FilesSource, HubSource
from lazypipe.stages.stage_row import CorpusSize, Vocabulary
from lazypipe.stages.tokenization.config import FileTokenizer, HubTokenizer, TokenizeConfig, TrainTokenizer
from lazypipe.stages.tokenization.identity import check_source

BYTES_PER_TOKEN_GUESS = 2  # of text; a byte-level BPE gives 3-4, so this is on the safe side


def make_paths_absolute(section: dict[str, Any]) -> None:
    """Make the paths of data and tokenizer absolute in the section `tokenize`, in place."""
    source, tokenizer = section.get("source"), section.get("tokenizer")
    if isinstance(source, dict) and source.get("kind") == "files" and isinstance(source.get("paths"), str):
        raise UserError(f"tokenize.source.paths: expected a list, found {source['paths']!r}; write [{source['paths']}]")
    if isinstance(source, dict) and isinstance(source.get("paths"), list):
        source["paths"] = [absolute(p) if isinstance(p, str) and not is_uri(p) else p for p in source["paths"]]
    if isinstance(tokenizer, dict) and isinstance(tokenizer.get("path"), str):
        tokenizer["path"] = absolute(tokenizer["path"])
    for part, key in ((source, "dataset"), (tokenizer, "name")):
        if isinstance(part, dict) and part.get("kind") == "hub" and isinstance(part.get(key), str):
            part[key] = absolute_directory(part[key])


def local_files(config: TokenizeConfig) -> list[str]:
    """The paths that corpus and tokenizer are read from; URIs are left out, for every node reads those itself."""
    paths: list[str] = []
    if isinstance(config.source, FilesSource):
        paths += [path for path in config.source.paths if not is_uri(path)]
    if isinstance(config.source, HubSource) and looks_like_a_path(config.source.dataset):
        paths.append(config.source.dataset)
    if isinstance(config.tokenizer, FileTokenizer):
        paths.append(config.tokenizer.path)
    if isinstance(config.tokenizer, HubTokenizer) and looks_like_a_path(config.tokenizer.name):
        paths.append(config.tokenizer.name)
    return paths


def check_corpus(config: TokenizeConfig, cache_dir: Path | None, *, min_tokens: int = 0) -> int:
    """Bytes of text in the corpus, 0 for a hub dataset; UserError for one that `check_source` refuses."""
    return check_source(config, cache_dir, min_tokens=min_tokens).bytes


def vocabulary(config: TokenizeConfig) -> Vocabulary | None:
    """The vocabulary of a corpus that is not tokenized yet; None when nothing bounds it."""
    if isinstance(config.tokenizer, TrainTokenizer):
        return Vocabulary(config.tokenizer.vocab_size, exact=True)
    if isinstance(config.tokenizer, FileTokenizer) and Path(config.tokenizer.path).suffix == ".json":
        size = _size_in_file(Path(config.tokenizer.path))
        if size is not None:
            return Vocabulary(size, exact=True)
    return Vocabulary(2**16, exact=False) if config.token_dtype == "uint16" else None


def _size_in_file(path: Path) -> int | None:
    """The number of tokens in a tokenizer.json; None when it is not one (planning says so in its own words)."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        model = stored["model"]["vocab"]
        ids = set(model.values()) if isinstance(model, dict) else set(range(len(model)))
        ids |= {token["id"] for token in stored.get("added_tokens", ())}
        return 1 + max(ids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def disk_bytes(config: TokenizeConfig, corpus: CorpusSize) -> int:
    """Bytes of the token shards, from above."""
    return corpus.text_bytes // BYTES_PER_TOKEN_GUESS * (2 if config.token_dtype == "uint16" else 4)
