"""How fast text becomes final shards, and in how much memory: `lazypipe bench tokenize`.

The same text with the same tokenizer on the same two cores, interleaved, medians:

    ours       the stage's encode pass: read jsonl, encode, split, hash, write shards and document tables
    raw        `tokenizers`: encode_batch_fast and .ids of texts that are in memory already; nothing is read or written
    datasets   batched datasets.map(num_proc) with the same encode_batch_fast, and save_to_disk; loading is not timed
    customary  datasets.map and save_to_disk with tokenizer(rows["text"]), as the examples of transformers have it: with
               masks and without EOS; where transformers is installed

The whole stage (hashing every document first, and the report's table and figure) is timed beside them. Text is
Shakespeare's plays cut at blank lines into documents of about 4 KB, each copy numbered so that no two are equal.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lazypipe.pipeline.bench.memory_watch import MemoryWatch
from lazypipe.stages.contract import Context, UserError, file_sha256
from lazypipe.stages.data.source_files import embedded_paths
from lazypipe.stages.tokenization.config import TokenizeConfig
from lazypipe.stages.tokenization.encode import Coder
from lazypipe.stages.tokenization.filters import filter_documents
from lazypipe.stages.tokenization.passes import encode_corpus, scan_corpus
from lazypipe.stages.tokenization.split import choose_validation
from lazypipe.stages.tokenization.stage import run
from lazypipe.stages.tokenization.tokenizer import TRAINED_EOS, train_tokenizer

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


def throughput(options: argparse.Namespace, folder: Path, map_function: MapFunction) -> dict[str, Any]:
    """MB/s of text by loop: medians of interleaved rounds, and ours over the others."""
    corpus, tokenizer_json = folder / "corpus.jsonl", folder / "tokenizer.json"
    size = write_corpus(corpus, options.megabytes)
    train_tokenizer(documents(), options.vocab_size).save(str(tokenizer_json))
    ours = Ours(corpus, tokenizer_json, folder, map_function, options.processes)
    spawn = get_context("spawn")
    raw, shares = (str(corpus), str(tokenizer_json)), range(options.processes)
    with (
        ProcessPoolExecutor(1, spawn) as threaded,
        ProcessPoolExecutor(options.processes, spawn) as spread,
        ProcessPoolExecutor(1, spawn) as hugging_face,
    ):

        def raw_threads() -> tuple[int, float]:
            return threaded.submit(encode_raw, *raw, 0, 1, options.processes).result()

        def raw_processes() -> tuple[int, float]:
            futures = [spread.submit(encode_raw, *raw, share, options.processes, 1) for share in shares]
            done = [future.result() for future in futures]
            return sum(tokens for tokens, _ in done), max(seconds for _, seconds in done)

        def with_datasets(customary: bool) -> float:
            return hugging_face.submit(encode_with_datasets, *raw, str(folder), options.processes, customary).result()

        counts = {ours.encode()[0], raw_threads()[0], raw_processes()[0]}  # which starts and warms everything, too
        if len(counts) != 1:
            raise RuntimeError(f"the loops disagree about the number of tokens: {sorted(counts)}")
        kinds = {"datasets": False, "customary": True} if find_spec("transformers") else {"datasets": False}
        for customary in kinds.values():
            with_datasets(customary)
        seconds: dict[str, list[float]] = {name: [] for name in ("ours", "raw_1x2", "raw_2x1", *kinds, "stage")}
        for _ in range(options.repeats):
            seconds["ours"].append(ours.encode()[1])
            seconds["raw_1x2"].append(raw_threads()[1])
            seconds["raw_2x1"].append(raw_processes()[1])
            for name, customary in kinds.items():
                seconds[name].append(with_datasets(customary))
            seconds["stage"].append(ours.stage())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "megabytes": size / 1e6,
        "tokens": counts.pop(),
        "units": len(ours.corpus.units),
        "seconds": seconds,
        "mb_per_s": {name: size / 1e6 / median for name, median in medians.items()},
        "ours_over_raw": min(medians["raw_1x2"], medians["raw_2x1"]) / medians["ours"],
        **{f"ours_over_{name}": medians[name] / medians["ours"] for name in kinds},
    }


def memory(megabytes: float, vocab_size: int, folder: Path, map_function: MapFunction) -> dict[str, float]:
    """Peak resident MB of the whole stage, its tokenizer trained too: this process, the largest worker, and all."""
    corpus = folder / f"corpus-{megabytes:g}.jsonl"
    size = write_corpus(corpus, megabytes)
    context = Context(folder / "output", folder / "scratch", map_function=map_function)
    config = TokenizeConfig.model_validate(
        {
            "source": {"kind": "files", "paths": [str(corpus)]},
            "tokenizer": {"kind": "train", "vocab_size": vocab_size},
            "shard_bytes": min(64 * 2**20, corpus.stat().st_size // 8 + 1),  # units of the default size, if it fills 8
        }
    )
    for directory in (context.output_dir, context.scratch_dir):
        directory.mkdir(parents=True)
    watch = MemoryWatch()
    with watch:
        began = time.perf_counter()
        run(config, {}, context)
        seconds = time.perf_counter() - began
    return {"megabytes": size / 1e6, "seconds": seconds, **watch.peaks()}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lazypipe bench tokenize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=24, help="text to encode in each round")
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--processes", type=int, default=2, help="workers of every loop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--memory", type=float, nargs="+", metavar="MB", help="peak memory of the stage on so much text instead"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    for name, least in (("megabytes", 1), ("vocab_size", 257), ("processes", 1), ("repeats", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}")
    if options.memory is not None and min(options.memory) < 1:
        raise UserError(f"--memory {min(options.memory):g}: must be at least 1")
    if options.json is not None and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: {options.json.parent} is no folder; create it first")
    return options


def bench(options: argparse.Namespace, map_function: MapFunction, start_s: float) -> dict[str, Any]:
    """Measure, print, and return what --json writes. start_s: seconds that starting the workers' cluster took."""
    about = {
        "machine": {"cpu": _cpu_model(), "cpus": len(os.sched_getaffinity(0))},
        "versions": {name: version(name) for name in ("ray", "tokenizers", "datasets", "pyarrow")}
        | {"python": platform.python_version()},
        "vocab_size": options.vocab_size,
        "ray_start_s": start_s,
    }
    with tempfile.TemporaryDirectory() as name:
        if options.memory is not None:
            rows = []
            print(f"{'text MB':>8} {'seconds':>8} {'driver MB':>10} {'worker MB':>10} {'all MB':>7}", flush=True)
            for megabytes in options.memory:
                with tempfile.TemporaryDirectory(dir=name) as folder:
                    row = memory(megabytes, options.vocab_size, Path(folder), map_function)
                rows.append(row)
                print(
                    f"{row['megabytes']:>8.1f} {row['seconds']:>8.1f} {row['driver_mb']:>10.0f} "
                    f"{row['worker_mb']:>10.0f} {row['all_mb']:>7.0f}",
                    flush=True,
                )
            return {**about, "memory": rows}
        found = throughput(options, Path(name), map_function)
    labels = {
        "ours": f"ours, encode pass to final shards ({found['units']} units)",
        "raw_1x2": f"raw tokenizers, 1 process x {options.processes} threads",
        "raw_2x1": f"raw tokenizers, {options.processes} processes x 1 thread",
        "datasets": f"datasets.map(num_proc={options.processes}) + save_to_disk",
        "customary": "the same with tokenizer(rows['text']) of transformers",
        "stage": "ours, the whole stage",
    }
    print(
        f"{found['megabytes']:.1f} MB of text, {found['tokens']:,} tokens; starting Ray took {start_s:.1f} s (excluded)"
    )
    print(f"{'':<52} {'MB/s':>7} {'seconds, each round':>24}")
    for key in found["seconds"]:
        rounds = " ".join(f"{value:.2f}" for value in found["seconds"][key])
        print(f"{labels[key]:<52} {found['mb_per_s'][key]:>7.2f}  {rounds}")
    prefix = "ours_over_"
    ratios = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    print("   ".join(f"ours / {name} {value:.2f}" for name, value in ratios.items()))
    return {**about, **found}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
