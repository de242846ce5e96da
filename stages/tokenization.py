"""The tokenize stage: text in, token shards of a training and a validation split out.

Three passes over the corpus, each streaming. (1) Hash every document, in parallel; the hashes alone decide the split.
(2) Train the tokenizer on the training documents, or load one. (3) Encode, in parallel: each worker writes the shards
of its unit, and they are then numbered in input order.

    tokenizer/tokenizer.json       train/shard-00000.arrow ...  train/docs.arrow       validation/ the same
    tables/document_lengths, tables/sources, figures/document_lengths.png
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from stages.contract import Artifact, Context, Interrupted, Outputs
from stages.corpus import check_source, corpus_fingerprint, source_identity
from stages.documents import PIECE_BYTES, Layout, Part, plan_units
from stages.encoding import (
    SPLITS,
    Coder,
    EncodedSplit,
    EncodedUnit,
    EncodeTask,
    PartScan,
    encode_unit,
    scan_unit,
    training_texts,
)
from stages.shards import DOCUMENTS_FILE, DOCUMENTS_SCHEMA, read_documents, shard_name, write_documents
from stages.source_files import SourceFile, file_facts, source_files
from stages.split import Split, choose_validation
from stages.token_statistics import (
    length_figure,
    length_histogram,
    source_rows,
    unigram_entropy,
    warn_of_eos_in_text,
    warn_of_invalid_utf8,
    warn_of_large_validation,
)
from stages.tokenize_config import HubSource, TokenizeConfig, TrainTokenizer
from stages.tokenizer import (
    TRAINED_EOS,
    check_vocabulary,
    find_eos,
    joins_pieces_exactly,
    load_tokenizer,
    number_of_ids,
    special_tokens,
    train_tokenizer,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

STAGE_VERSION = TokenizeConfig.STAGE_VERSION
UNITS_DIRECTORY = ".units"


@dataclass(frozen=True)
class Corpus:
    """A source ready to be read: its parts in units, and after the first pass what is in them."""

    layout: Layout
    units: list[tuple[Part, ...]]
    scans: list[list[PartScan]]

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        return np.concatenate([scan.sizes for unit in self.scans for scan in unit])

    @property
    def digests(self) -> npt.NDArray[np.bytes_]:
        return np.concatenate([scan.digests for unit in self.scans for scan in unit])


def run(config: TokenizeConfig, inputs: Mapping[str, Artifact], context: Context) -> Outputs:
    """Tokenize the source of `config`; no inputs. See the module for the files, below for facts and metrics.

    Raises Refusal for a source or tokenizer the user must change, Interrupted when asked to stop.
    """
    assert not inputs, "the tokenize stage has no upstream"
    check_source(config, context.scratch_dir)
    identity = source_identity(config, context.scratch_dir)
    corpus = _scan(config, context)
    sizes = corpus.sizes
    warn_of_invalid_utf8(source_rows(corpus.units, corpus.scans))
    split = choose_validation(corpus.digests, sizes, config.validation_fraction)
    warn_of_large_validation(split, int(sizes.sum()), config.validation_fraction)

    tokenizer, eos_token = _tokenizer(config, corpus, sizes, split, context)
    num_ids = number_of_ids(tokenizer)
    check_vocabulary(num_ids, config.token_dtype)
    if sizes.max() > PIECE_BYTES and not joins_pieces_exactly(tokenizer):
        warnings.warn(
            f"{int((sizes > PIECE_BYTES).sum())} documents are longer than {PIECE_BYTES} bytes and are encoded in "
            "pieces cut at line breaks; this tokenizer treats the beginning of a text specially, so a few tokens at "
            "those places differ from encoding the document at once",
            stacklevel=2,
        )
    tokenizer_json = context.output_dir / "tokenizer" / "tokenizer.json"
    tokenizer_json.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(tokenizer_json))

    eos_id = int(tokenizer.token_to_id(eos_token))
    coder = Coder(tokenizer_json, eos_id, eos_token, num_ids, config.token_dtype)
    encoded = _encode(config, corpus, split, coder, context)
    warn_of_eos_in_text(sum(unit.eos_in_text for unit in encoded), eos_token)
    splits = _assemble(encoded, context.output_dir)
    histogram = length_histogram({name: _document_lengths(context.output_dir / name) for name in splits})
    context.log_table("document_lengths", histogram)
    context.log_table("sources", source_rows(corpus.units, corpus.scans))
    context.log_figure("document_lengths", length_figure(histogram))

    documents = int((sizes > 0).sum())
    metrics = {
        f"{name}_{quantity}": float(entry[quantity])
        for name, entry in splits.items()
        for quantity in ("documents", "tokens", "bytes")
    }
    metrics["bytes_per_token"] = int(sizes.sum()) / sum(entry["tokens"] for entry in splits.values())
    metrics["vocab_size"] = float(num_ids)
    metrics["unigram_entropy"] = unigram_entropy(np.sum([unit.token_counts for unit in encoded], axis=0))
    facts = {
        "vocab_size": num_ids,
        "eos_id": eos_id,
        "eos_token": eos_token,
        "token_dtype": config.token_dtype,
        "splits": splits,
        "source": {
            "kind": config.source.kind,
            "fingerprint": corpus_fingerprint(config, identity),
            "files": len({part.file.path for unit in corpus.units for part in unit}),
            "documents": documents,
            "skipped_rows": len(sizes) - documents,
            "bytes": int(sizes.sum()),
            **({"commit": identity["source"]["commit"]} if "commit" in identity["source"] else {}),
        },
        "invalid_utf8_bytes": sum(scan.invalid_bytes for unit in corpus.scans for scan in unit),
        "document_length_histogram": histogram,
    }
    return Outputs(metrics, facts)


def _scan(config: TokenizeConfig, context: Context) -> Corpus:
    """Bring the source to files, cut them into units and hash every document."""
    source = config.source
    files: list[SourceFile]
    if isinstance(source, HubSource):
        from stages.hub import copy_to_parquet

        files = copy_to_parquet(source, context)
    else:
        files = source_files(source)
    layout = Layout(getattr(source, "text_column", "text"), getattr(source, "document_separator", None))
    facts = file_facts(files, context.scratch_dir)
    sized = [(file, found.text_bytes) for file, found in zip(files, facts, strict=True)]
    units = plan_units(sized, layout, config.shard_bytes)
    total = sum(part.size for unit in units for part in unit)
    scans: list[list[PartScan]] = []
    done = 0
    tasks = [(unit, layout, config.invalid_utf8 == "refuse") for unit in units]
    for unit, scan in zip(units, _map(scan_unit, tasks, context), strict=True):
        scans.append(scan)
        done += sum(part.size for part in unit)
        context.progress(done, total, "bytes", phase="reading")
    return Corpus(layout, units, scans)


def _tokenizer(
    config: TokenizeConfig, corpus: Corpus, sizes: npt.NDArray[np.int64], split: Split, context: Context
) -> tuple[Any, str]:
    """(tokenizer, EOS token), trained on the training documents or loaded."""
    if not isinstance(config.tokenizer, TrainTokenizer):
        tokenizer, own_eos = load_tokenizer(config.tokenizer)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        return tokenizer, find_eos(vocabulary, special_tokens(tokenizer), config.tokenizer.eos_token, own_eos)
    texts = training_texts(corpus.units, corpus.layout, split.sides, sizes, config.validation_fraction)
    total = int(sizes.sum()) - split.validation_bytes
    watched = _watched(texts, total, context)
    return train_tokenizer(watched, config.tokenizer.vocab_size), TRAINED_EOS


def _watched(texts: Iterable[str], total: int, context: Context) -> Iterator[str]:
    done = 0
    for text in texts:
        yield text
        _stop_if_asked(context, "the tokenizer was being trained")
        done += len(text.encode())
        context.progress(min(done, total), total, "bytes", phase="training the tokenizer")


def _encode(config: TokenizeConfig, corpus: Corpus, split: Split, coder: Coder, context: Context) -> list[EncodedUnit]:
    sizes = corpus.sizes
    total = int(sizes.sum())
    began = time.monotonic()

    def report(done_bytes: int, done_tokens: int) -> None:
        _stop_if_asked(context, f"{done_bytes} of {total} bytes were encoded")
        seconds = max(time.monotonic() - began, 1e-9)
        context.progress(
            done_bytes,
            total,
            "bytes",
            phase="encoding",
            mb_per_s=round(done_bytes / seconds / 1e6, 2),
            tokens_per_s=round(done_tokens / seconds),
            eta_s=round((total - done_bytes) * seconds / max(done_bytes, 1), 1),
        )

    tasks = []
    first_row = 0
    for number, (unit, scans) in enumerate(zip(corpus.units, corpus.scans, strict=True)):
        rows = slice(first_row, first_row + sum(scan.rows for scan in scans))
        tasks.append(
            EncodeTask(
                unit=unit,
                number=number,
                layout=corpus.layout,
                first_row=first_row,
                sides=split.sides[rows],
                sizes=sizes[rows],
                validation_fraction=config.validation_fraction,
                coder=coder,
                shard_bytes=config.shard_bytes,
                directory=context.output_dir / UNITS_DIRECTORY,
                parent_pid=os.getpid(),
            )
        )
        first_row = rows.stop
    if len(tasks) == 1:  # nothing to spread: encode here, with the library's threads, and report within the unit
        return [encode_unit(tasks[0], report)]
    encoded = []
    done_bytes = done_tokens = 0
    for unit_result in _map(encode_unit, tasks, context):
        encoded.append(unit_result)
        done_bytes += sum(part.bytes for part in unit_result.splits.values())
        done_tokens += sum(part.tokens for part in unit_result.splits.values())
        report(done_bytes, done_tokens)
    return encoded


def _map(function: Callable[[Item], Result], items: Sequence[Item], context: Context) -> Iterator[Result]:
    """context.map, except that a single item stays here, and that a request to stop ends it between two results."""
    results = map(function, items) if len(items) == 1 else context.map(function, items)
    for done, result in enumerate(results, start=1):
        yield result
        _stop_if_asked(context, f"{done} of {len(items)} parts were done")


def _stop_if_asked(context: Context, state: str) -> None:
    if context.stop_requested:
        raise Interrupted(f"tokenization stopped ({state}); it starts again from the beginning")


def _assemble(encoded: list[EncodedUnit], output_dir: Path) -> dict[str, dict[str, Any]]:
    """Number the units' shards in input order, join their document rows, and return the `splits` facts."""
    splits: dict[str, dict[str, Any]] = {}
    for name in SPLITS.values():
        parts = [unit.splits[name] for unit in encoded]
        directory = output_dir / name
        directory.mkdir(parents=True, exist_ok=True)
        shards = [path for part in parts for path in part.shards]
        names = [shard_name(number) for number in range(len(shards))]
        for path, shard in zip(shards, names, strict=True):
            path.replace(directory / shard)
        write_documents(directory / DOCUMENTS_FILE, _joined_documents(parts))
        splits[name] = {
            "documents": sum(part.documents for part in parts),
            "tokens": sum(part.tokens for part in parts),
            "bytes": sum(part.bytes for part in parts),
            "shards": names,
        }
    shutil.rmtree(output_dir / UNITS_DIRECTORY)
    return splits


def _joined_documents(parts: Sequence[EncodedSplit]) -> Iterator[Any]:
    import pyarrow.compute as pc

    first_token = 0
    for part in parts:
        table = read_documents(part.documents_file)
        yield table.set_column(0, DOCUMENTS_SCHEMA.field("start"), pc.add(table.column("start"), first_token))
        first_token += part.tokens


def _document_lengths(directory: Path) -> list[npt.NDArray[np.int64]]:
    """Lengths in tokens, memory-mapped, in the chunks they are stored in."""
    column = read_documents(directory / DOCUMENTS_FILE).column("length")
    return [chunk.to_numpy(zero_copy_only=True) for chunk in column.chunks]
