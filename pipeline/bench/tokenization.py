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
import json
import os
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lazypipe.pipeline.bench.memory_watch import MemoryWatch
from lazypipe.pipeline.bench.options import Parser, check_at_least, check_writable, exit_code
from lazypipe.pipeline.bench.timing import interleaved
from lazypipe.pipeline.bench.tokenization_loops import (
    MapFunction,
    Ours,
    documents,
    encode_raw,
    encode_with_datasets,
    write_corpus,
)
from lazypipe.pipeline.execution.backends import map_with_ray
from lazypipe.stages.contract import Context
from lazypipe.stages.tokenization.config import TokenizeConfig
from lazypipe.stages.tokenization.stage import run
from lazypipe.stages.tokenization.tokenizer import train_tokenizer


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
        measures: dict[str, Callable[[], float]] = {
            "ours": lambda: ours.encode()[1],
            "raw_1x2": lambda: raw_threads()[1],
            "raw_2x1": lambda: raw_processes()[1],
            **{name: partial(with_datasets, customary) for name, customary in kinds.items()},
            "stage": ours.stage,
        }
        times = interleaved(measures, options.repeats, warm_up=0)
    faster = min(("raw_1x2", "raw_2x1"), key=times.median)
    ratios = {"raw": times.ratio(faster, "ours"), **{name: times.ratio(name, "ours") for name in kinds}}
    return {
        "megabytes": size / 1e6,
        "tokens": counts.pop(),
        "units": len(ours.corpus.units),
        "seconds": times.seconds,
        "mb_per_s": {name: size / 1e6 / times.median(name) for name in measures},
        **{f"ours_over_{name}": ratio.median for name, ratio in ratios.items()},
        "intervals": {name: [ratio.low, ratio.high] for name, ratio in ratios.items()},
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
    parser = Parser("tokenize", __doc__)
    parser.add_argument("--megabytes", type=float, default=24, help="text to encode in each round")
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--processes", type=int, default=2, help="workers of every loop")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--memory", type=float, nargs="+", metavar="MB", help="peak memory of the stage on so much text instead"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    check_at_least(options, megabytes=1, vocab_size=257, processes=1, repeats=1, memory=1)
    check_writable("--json", options.json)
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
    print(
        "   ".join(
            f"ours / {name} {found[f'ours_over_{name}']:.2f} ({low:.2f}-{high:.2f})"
            for name, (low, high) in found["intervals"].items()
        )
    )
    return {**about, **found}


def main(arguments: Sequence[str]) -> int:
    """Start Ray, whose tasks are the stage's workers as in the pipeline; measure, print; --json writes the numbers."""
    options = parse(arguments)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (15 by default: no loop is to be nicer)
    os.environ.pop("RAY_ADDRESS", None)
    began = time.perf_counter()
    import ray

    ray.init(address="local", num_cpus=options.processes, include_dashboard=False, logging_level="WARNING")
    start_s = time.perf_counter() - began
    try:
        found = bench(options, map_with_ray, start_s)
    finally:
        ray.shutdown()
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
