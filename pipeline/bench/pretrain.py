"""What our training loop costs beside others that train the same model on the same batches: `lazypipe bench pretrain`.

    ours     lazypipe.stages.pretrain.stage.run as it is: reading shards, logging every step, sampling sparsity and sink
    bare     forward, backward, clipping, fused AdamW and one .item() a step, the batches made beforehand
    trainer  transformers.Trainer around the model, logging every step (when transformers and accelerate are installed)

All three run in one process and take turns: ours stops after every `--steps` optimizer steps, and each of the others
takes as many before it goes on, so that whatever else the machine does falls on all alike. A ratio belongs to one turn.
The bare loop must arrive at our losses, or the times would compare different things.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lazypipe.pipeline.bench.options import Parser, check_at_least, check_writable, exit_code
from lazypipe.pipeline.bench.pretrain_loops import bare_loop, compute_device, random_corpus, synchronise, trainer_loop
from lazypipe.pipeline.bench.timing import Ratio, Timings
from lazypipe.stages.contract import Context, UserError
from lazypipe.stages.data.batches import training_batch
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.config import PretrainConfig

WARM_UP_TURNS = 1
Clock = Callable[[], float]
# CPU seconds leave out what other processes take: for loops on a CPU that others use as well.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class TurnsContext(Context):
    """Lets the others take their turn after every `turn_steps` steps, and times what lies between."""

    def prepare(self, turn_steps: int, others: Mapping[str, Callable[[], float]], clock: Clock) -> None:
        self.turn_steps, self.others, self.clock = turn_steps, others, clock
        self.rounds: list[dict[str, float]] = []
        self.numbers: list[Mapping[str, float]] = []
        self.began = math.nan

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log_metrics(step, metrics)
        self.numbers.append(metrics)
        if step % self.turn_steps:
            return
        synchronise()
        seconds = self.clock() - self.began
        self.rounds.append({"ours": seconds, **{name: turn() for name, turn in self.others.items()}})
        self.began = self.clock()


def compare(
    config: PretrainConfig, vocab_size: int, turn_steps: int, with_trainer: bool, clock: Clock
) -> dict[str, Any]:
    """Times of all loops on one config, whose `steps` are the turns' steps together."""
    device = compute_device()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = random_corpus(folder / "corpus", vocab_size, config)
        shards, micro_batches = TokenShards(corpus.path / "train"), config.micro_batches_per_step
        size = config.micro_batch_size
        batches = [
            torch.from_numpy(training_batch(shards, config.seq_len, config.seed, number * size, size))
            for number in range(config.steps * micro_batches)
        ]
        bare, bare_losses = bare_loop(config, vocab_size, batches, turn_steps, clock)
        others = {"bare": bare}
        if with_trainer:
            others["trainer"] = trainer_loop(config, vocab_size, batches, turn_steps, folder / "trainer", clock)
        (folder / "output").mkdir()
        (folder / "scratch").mkdir()
        context = TurnsContext(folder / "output", folder / "scratch")
        context.prepare(turn_steps, others, clock)
        pretrain.run(config, {"tokenize": corpus}, context)
    ours = [numbers["loss"] for numbers in context.numbers]
    apart = max(abs(a - b) for a, b in zip(ours, bare_losses, strict=True))
    if apart > 1e-3:
        raise RuntimeError(f"the bare loop's losses are {apart:g} from ours: the loops train different things")
    # The first turn warms up; the last one's end holds the final validation and checkpoint.
    times = Timings()
    for one_round in context.rounds[WARM_UP_TURNS:-1]:
        times.add(one_round)
    counted = context.numbers[WARM_UP_TURNS * turn_steps : -turn_steps]
    seconds = sum(numbers["step_seconds"] for numbers in counted)
    waited = sum(numbers["data_wait"] * numbers["step_seconds"] for numbers in counted)
    tokens = turn_steps * config.tokens_per_step
    return {
        "mixer": config.model.mixer,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "turns": len(times.seconds["ours"]),
        "steps_per_turn": turn_steps,
        "tokens_per_s": {name: tokens / times.median(name) for name in times.seconds},
        "ratio_of_ours": {name: times.ratio("ours", name)._asdict() for name in others},
        "data_wait": waited / seconds,
        "largest_loss_difference": apart,
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("pretrain", __doc__)
    parser.add_argument("--mixer", nargs="+", default=["standard"], help="mechanisms, one row each")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile, the others as they are")
    parser.add_argument("--turns", type=int, default=10, help="interleaved turns that count")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a turn")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: CPU seconds, for a CPU that others use as well"
    )
    parser.add_argument("--no-trainer", action="store_true", help="leave transformers.Trainer out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args(arguments)
    check_at_least(options, turns=1, steps=1, vocab_size=1, threads=1)
    check_writable("--json", options.json)
    if options.clock == "cpu" and torch.cuda.is_available():
        raise UserError("--clock cpu: a GPU computes here, whose time it does not see; leave it out")
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing and not options.no_trainer:
        raise UserError(
            f"bench pretrain: {' and '.join(missing)} missing; give --no-trainer, or install with  python -m pip "
            'install -c constraints.txt -e ".[test]"'
        )
    return options


def config_of(options: argparse.Namespace, mixer: str) -> PretrainConfig:
    steps = (options.turns + WARM_UP_TURNS + 1) * options.steps
    model = {name: getattr(options, name) for name in ("hidden_size", "num_layers", "num_heads")}
    fields = {
        name: getattr(options, name) for name in ("seq_len", "tokens_per_step", "micro_batch_size", "dtype", "compile")
    }
    fields |= {"model": {**model, "mixer": mixer, "max_seq_len": options.seq_len}, "validation_windows": 8}
    intervals = {"validate_every": steps, "checkpoint_every": steps, "warmup_steps": min(10, steps - 1)}
    try:
        return PretrainConfig.model_validate({**fields, **intervals, "steps": steps})
    except ValidationError as error:
        raise UserError(f"--mixer {mixer}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def main(arguments: Sequence[str]) -> int:
    """Print a row per mechanism; with --json write them, and what they were measured with, to a file."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    configs = [config_of(options, mixer) for mixer in options.mixer]
    rows = []
    unit = "tokens/s" if options.clock == "wall" else "per CPU s"
    print(f"{'mixer':<14} {unit:>9}  {'ours / bare (95 %)':>24}  {'ours / Trainer (95 %)':>24}  {'data wait':>9}")
    for config in configs:
        row = compare(config, options.vocab_size, options.steps, not options.no_trainer, CLOCKS[options.clock])
        rows.append(row)
        cells = [written(row["ratio_of_ours"].get(name)) for name in ("bare", "trainer")]
        print(
            f"{row['mixer']:<14} {row['tokens_per_s']['ours']:>9,.0f}  {cells[0]:>24}  {cells[1]:>24}  "
            f"{row['data_wait']:>9.2%}",
            flush=True,
        )
    if options.json is not None:
        packages = ("torch",) if options.no_trainer else ("torch", "transformers", "accelerate")
        versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
        options_used = {name: value for name, value in vars(options).items() if name != "json"}
        found = {"options": options_used, "versions": versions, "machine": platform.machine(), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def written(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else Ratio(**found).text(3)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
