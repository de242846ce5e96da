"""What `lazypipe bench tokenize` times: the stage's encode pass, raw `tokenizers`, and datasets.map; and its text."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import Context, file_sha256
from lazypipe.stages.data.source_files import embedded_paths
from lazypipe.stages.tokenization.config import TokenizeConfig
from lazypipe.stages.tokenization.encode import Coder
from lazypipe.stages.tokenization.filters import filter_documents
from lazypipe.stages.tokenization.passes import encode_corpus, scan_corpus
from lazypipe.stages.tokenization.split import choose_validation
from lazypipe.stages.tokenization.stage import run
from lazypipe.stages.tokenization.tokenizer import TRAINED_EOS

MapFunction = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
_DOCUMENT_CHARACTERS = 4000
_BATCH_CHARACTERS = 2**20  # of the raw encoders: they too must not hold all encodings at once


def documents() -> list[str]:
    """The plays as documents of about 4 KB, cut at blank lines."""
    found, document = [], ""
    for path in embedded_paths():
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            document += paragraph + "\n\n"
            if len(document) >= _DOCUMENT_CHARACTERS:
                found.append(document)
                document = ""
    return [*found, document]


def write_corpus(path: Path, megabytes: float) -> int:
    """A jsonl file of at least so many MB (10^6 bytes) of text; returns the bytes of text."""
    texts = documents()
    written = copy = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            for text in texts:
                numbered = f"[{copy}] {text}"
                file.write(json.dumps({"text": numbered}) + "\n")
                written += len(numbered.encode())
                if written >= megabytes * 1e6:
                    break
            copy += 1
    return written


@functools.lru_cache(maxsize=1)
def _texts(corpus: str) -> list[str]:
    with Path(corpus).open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@functools.lru_cache(maxsize=1)
def _raw_encoder(tokenizer_json: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(tokenizer_json)


def encode_raw(corpus: str, tokenizer_json: str, share: int, shares: int, threads: int) -> tuple[int, float]:
    """(tokens, seconds) of one process with its share of the texts; loading them and the encoder is not timed.

    The encoder is kept from round to round, as ours is: each new one would be slower than the last.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    texts = _texts(corpus)[share::shares]
    tokenizer = _raw_encoder(tokenizer_json)
    began = time.perf_counter()
    tokens = size = 0
    batch: list[str] = []
    for number, text in enumerate(texts, start=1):
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS or number == len(texts):
            tokens += sum(len(e.ids) for e in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
            batch, size = [], 0
    return tokens, time.perf_counter() - began


def encode_with_datasets(corpus: str, tokenizer_json: str, folder: str, processes: int, customary: bool) -> float:
    """Seconds of map and save_to_disk. customary: with transformers' tokenizer, as its examples have it."""
    import datasets
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    loaded = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=f"{folder}/cache")
    tokenizer: Any = Tokenizer.from_file(tokenizer_json)
    eos = tokenizer.token_to_id(TRAINED_EOS)
    if customary:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_json)

    def encode(rows: dict[str, list[str]]) -> Any:
        if customary:
            return tokenizer(rows["text"])
        encodings = tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"input_ids": [[*encoding.ids, eos] for encoding in encodings]}

    with tempfile.TemporaryDirectory(dir=folder) as target:
        began = time.perf_counter()
        mapped = loaded.map(
            encode, batched=True, num_proc=processes, remove_columns=["text"], load_from_cache_file=False
        )
        mapped.save_to_disk(f"{target}/saved", num_proc=processes)
        seconds = time.perf_counter() - began
        for file in mapped.cache_files:
            Path(file["filename"]).unlink(missing_ok=True)
    return seconds


def _wake(number: int) -> int:
    """A task of which a free worker takes the next, so that all have imported what encoding needs."""
    import tokenizers  # noqa: F401

    time.sleep(0.2)
    return number


class Ours:
    """The stage's encode pass on a corpus that was hashed before, and the whole stage."""

    def __init__(self, corpus: Path, tokenizer_json: Path, folder: Path, map_function: MapFunction, processes: int):
        self.folder, self.map_function, self.processes = folder, map_function, processes
        self.config = TokenizeConfig.model_validate(
            {
                "source": {"kind": "files", "paths": [str(corpus)]},
                "tokenizer": {"kind": "file", "path": str(tokenizer_json)},
                "shard_bytes": corpus.stat().st_size // 8 + 1,  # 8 units: as many for each of 1, 2, 4 or 8 workers
            }
        )
        context = self._context(folder / "scanned")
        self.corpus = scan_corpus(self.config, context)
        sizes, digests = self.corpus.column("sizes"), self.corpus.column("digests")
        self.sizes = filter_documents(self.config.filters, digests, sizes, self.corpus.column("chars")).sizes
        self.split = choose_validation(digests, self.sizes, self.config.validation_fraction)
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(tokenizer_json))
        self.coder = Coder(
            tokenizer_json,
            file_sha256(tokenizer_json),
            tokenizer.token_to_id(TRAINED_EOS),
            TRAINED_EOS,
            tokenizer.get_vocab_size(),
            "uint16",
        )

    def encode(self) -> tuple[int, float]:
        """(tokens without EOS, seconds) of the encode pass into a fresh folder."""
        with tempfile.TemporaryDirectory(dir=self.folder) as fresh:
            context = self._context(Path(fresh))
            # Ray ends workers that were idle for a second: starting them again, 1 s a round, is not encoding.
            list(context.map(_wake, range(2 * self.processes)))
            began = time.perf_counter()
            encoded = encode_corpus(self.config, self.corpus, self.sizes, self.split, self.coder, context)
            seconds = time.perf_counter() - began
        parts = [part for split in encoded.splits.values() for part in split]
        return sum(part.tokens - part.documents for part in parts), seconds

    def stage(self) -> float:
        """Seconds of the whole stage in a fresh folder."""
        with tempfile.TemporaryDirectory(dir=self.folder) as fresh:
            context = self._context(Path(fresh))
            began = time.perf_counter()
            run(self.config, {}, context)
            return time.perf_counter() - began

    def _context(self, folder: Path) -> Context:
        context = Context(folder / "output", folder / "scratch", map_function=self.map_function)
        for directory in (context.output_dir, context.scratch_dir):
            directory.mkdir(parents=True)
        return context
