"""The tokenize stage: text in, token shards of a training and a validation split out.

Three passes over the corpus, each streaming. (1) Hash every document, in parallel; the hashes alone decide what is left
out and the split. (2) Train the tokenizer on the training documents, or load one. (3) Encode, in parallel: each worker
writes the shards of its unit, and they are then numbered in input order. What is done is kept in scratch_dir, unit by
unit (passes.py): a run that was killed, stopped or failed goes on from there, to the same bytes.

    tokenizer/tokenizer.json       train/shard-00000.arrow ...  train/docs.arrow       validation/ the same
    tables/document_lengths, tables/sources, figures/document_lengths.png
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lazypipe.stages.contract import Artifact, Context, Outputs, file_sha256
from lazypipe.stages.data.shards import DOCUMENTS_FILE, DOCUMENTS_SCHEMA, read_documents, shard_name, write_documents
from lazypipe.stages.facts import DroppedFacts, SourceFacts, SplitFacts, TokenizeFacts, UnitFacts
from lazypipe.stages.kept_work import keep, kept, work_key
from lazypipe.stages.tokenization.config import Filters, TokenizeConfig, TrainTokenizer
from lazypipe.stages.tokenization.corpus_stats import (
    length_figure,
    length_histogram,
    source_rows,
    unigram_entropy,
    warn_of_eos_in_text,
    warn_of_invalid_utf8,
    warn_of_large_validation,
)
from lazypipe.stages.tokenization.documents import PIECE_BYTES
from lazypipe.stages.tokenization.encode import Coder, EncodedSplit, training_texts
from lazypipe.stages.tokenization.filters import FILTERS, dropped_counts, filter_documents
from lazypipe.stages.tokenization.identity import check_source, corpus_fingerprint, source_identity
from lazypipe.stages.tokenization.passes import (
    Corpus,
    Encoded,
    encode_corpus,
    kept_folder,
    scan_corpus,
    sides_key,
    stop_if_asked,
)
from lazypipe.stages.tokenization.split import Split, choose_validation
from lazypipe.stages.tokenization.tokenizer import (
    TRAINED_EOS,
    check_vocabulary,
    find_eos,
    joins_pieces_exactly,
    load_tokenizer,
    number_of_ids,
    special_tokens,
    train_tokenizer,
    warn_of_small_vocabulary,
)

STAGE_VERSION = TokenizeConfig.STAGE_VERSION
_TOKENIZER_FILE = "tokenizer.json"


def run(config: TokenizeConfig, inputs: Mapping[str, Artifact], context: Context) -> Outputs[TokenizeFacts]:
    """Tokenize the source of `config`; no inputs. See the module for the files, below for facts and metrics.

    Raises UserError for a source or tokenizer the user must change, Interrupted when asked to stop.
    """
    assert not inputs, "the tokenize stage has no upstream"
    check_source(config, context.scratch_dir)
    identity = source_identity(config, context.scratch_dir)
    corpus = scan_corpus(config, context)
    bytes_read = corpus.column("sizes")
    digests = corpus.column("digests")
    filtered = filter_documents(config.filters, digests, bytes_read, corpus.column("chars"))
    sizes = filtered.sizes  # bytes of each document; 0 where it is left out
    sources = source_rows(corpus.units, corpus.scans, filtered.reasons)
    warn_of_invalid_utf8(sources, context.warn)
    split = choose_validation(digests, sizes, config.validation_fraction)
    del digests
    warn_of_large_validation(split, int(sizes.sum()), config.validation_fraction, context.warn)

    coder, tokenizer_resumed = _coder(config, corpus, sizes, split, context)
    encoded = encode_corpus(config, corpus, sizes, split, coder, context)
    warn_of_eos_in_text(encoded.eos_in_text, coder.eos_token, context.warn)
    splits = _assemble(encoded.splits, context.output_dir)
    histogram = length_histogram({name: _document_lengths(context.output_dir / name) for name in splits})
    context.log_table("document_lengths", histogram)
    context.log_table("sources", sources)
    context.log_figure("document_lengths", length_figure(histogram))

    documents = int((bytes_read > 0).sum())
    dropped = dropped_counts(filtered.reasons, bytes_read)
    facts = TokenizeFacts(
        vocab_size=coder.num_ids,
        eos_id=coder.eos_id,
        eos_token=coder.eos_token,
        token_dtype=config.token_dtype,
        splits=splits,
        source=SourceFacts(
            kind=config.source.kind,
            fingerprint=corpus_fingerprint(config, identity),
            files=len({part.file.path for unit in corpus.units for part in unit}),
            documents=documents,
            skipped_rows=len(sizes) - documents,
            bytes=int(bytes_read.sum()),
            commit=identity["source"].get("commit"),
        ),
        filters={
            name: DroppedFacts(dropped[f"{name}_documents"], dropped[f"{name}_bytes"]) for name in FILTERS.values()
        },
        units=UnitFacts(len(corpus.units), corpus.resumed, encoded.resumed, tokenizer_resumed),
        invalid_utf8_bytes=sum(scan.invalid_bytes for unit in corpus.scans for scan in unit),
        document_length_histogram=histogram,
    )
    return Outputs(_metrics(facts, encoded, dropped if config.filters != Filters() else {}), facts)


def _metrics(facts: TokenizeFacts, encoded: Encoded, dropped: Mapping[str, int]) -> dict[str, float]:
    """The stage's final metrics: documents, tokens and bytes of each split, and what the tokenizer makes of them."""
    metrics: dict[str, float] = {}
    for name, one in facts.splits.items():
        metrics |= {
            f"{name}_documents": float(one.documents),
            f"{name}_tokens": float(one.tokens),
            f"{name}_bytes": float(one.bytes),
        }
    splits = facts.splits.values()
    metrics["bytes_per_token"] = sum(one.bytes for one in splits) / sum(one.tokens for one in splits)
    metrics["vocab_size"] = float(facts.vocab_size)
    metrics["unigram_entropy"] = unigram_entropy(encoded.token_counts)
    metrics["units_resumed"] = float(encoded.resumed)
    return metrics | {name: float(count) for name, count in dropped.items()}


def _coder(
    config: TokenizeConfig, corpus: Corpus, sizes: npt.NDArray[np.int64], split: Split, context: Context
) -> tuple[Coder, bool]:
    """Train or load the tokenizer and save it in the outputs; (what encodes with it, whether its training was kept)."""
    tokenizer, eos_token, resumed = _tokenizer(config, corpus, sizes, split, context)
    num_ids = number_of_ids(tokenizer)
    check_vocabulary(num_ids, config.token_dtype)
    if sizes.max() > PIECE_BYTES and not joins_pieces_exactly(tokenizer):
        context.warn(
            f"{int((sizes > PIECE_BYTES).sum())} documents are longer than {PIECE_BYTES} bytes and are encoded in "
            "pieces cut at line breaks; this tokenizer treats the beginning of a text specially, so a few tokens at "
            "those places differ from encoding the document at once"
        )
    path = context.output_dir / "tokenizer" / _TOKENIZER_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    eos_id = int(tokenizer.token_to_id(eos_token))
    return Coder(path, file_sha256(path), eos_id, eos_token, num_ids, config.token_dtype), resumed


def _tokenizer(
    config: TokenizeConfig, corpus: Corpus, sizes: npt.NDArray[np.int64], split: Split, context: Context
) -> tuple[Any, str, bool]:
    """(tokenizer, EOS token, whether an earlier attempt had trained it): trained on training documents, or loaded."""
    from tokenizers import Tokenizer

    if not isinstance(config.tokenizer, TrainTokenizer):
        tokenizer, own_eos = load_tokenizer(config.tokenizer, context.warn)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        eos_token = find_eos(vocabulary, special_tokens(tokenizer), config.tokenizer.eos_token, own_eos)
        return tokenizer, eos_token, False
    vocab_size = config.tokenizer.vocab_size
    target = kept_folder(context, "tokenizer") / "trained"
    how = [vocab_size, config.validation_fraction, version("tokenizers")]
    key = work_key(corpus.keys, sides_key(split.sides), how)
    earlier = kept(target, key)
    if earlier.problem is not None:
        context.warn(f"the kept tokenizer is damaged ({earlier.problem}); it is trained again")
    if earlier.facts is not None:
        tokenizer = Tokenizer.from_file(str(target / _TOKENIZER_FILE))
        warn_of_small_vocabulary(tokenizer, vocab_size, context.warn)
        return tokenizer, TRAINED_EOS, True
    texts = training_texts(corpus.units, corpus.layout, split.sides, sizes, config.validation_fraction)
    total = int(sizes.sum()) - split.validation_bytes
    tokenizer = train_tokenizer(_watched(texts, total, context), vocab_size, context.warn)

    def write(directory: Path) -> dict[str, Any]:
        tokenizer.save(str(directory / _TOKENIZER_FILE))
        return {"vocab_size": tokenizer.get_vocab_size()}

    keep(target, key, write)
    return tokenizer, TRAINED_EOS, False


def _watched(texts: Iterable[str], total: int, context: Context) -> Iterator[str]:
    done = 0
    for text in texts:
        yield text
        stop_if_asked(context, "the tokenizer was being trained and starts again; the hashes are kept")
        done += len(text.encode())
        context.progress(min(done, total), total, "bytes", phase="training the tokenizer")


def _assemble(encoded: Mapping[str, Sequence[EncodedSplit]], output_dir: Path) -> dict[str, SplitFacts]:
    """Number the units' shards in input order, join their document rows, and return the `splits` facts."""
    splits: dict[str, SplitFacts] = {}
    for name, parts in encoded.items():
        directory = output_dir / name
        directory.mkdir(parents=True, exist_ok=True)
        shards = [path for part in parts for path in part.shards]
        names = [shard_name(number) for number in range(len(shards))]
        for path, shard in zip(shards, names, strict=True):
            _share(path, directory / shard)
        write_documents(directory / DOCUMENTS_FILE, _joined_documents(parts))
        splits[name] = SplitFacts(
            documents=sum(part.documents for part in parts),
            tokens=sum(part.tokens for part in parts),
            bytes=sum(part.bytes for part in parts),
            shards=names,
        )
    return splits


def _share(kept_file: Path, target: Path) -> None:
    """A second name for the same file: killed before the commit, the kept unit is still whole, and nothing is copied.

    The scratch directory goes with the commit. Where a file system knows no hard links, the file is moved.
    """
    try:
        os.link(kept_file, target)
    except OSError:
        shutil.move(kept_file, target)


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
