"""What training pays for a resume checkpoint, written at once and in the background: `lazypipe bench checkpoint`.

Interleaved rounds of the same training steps without a checkpoint, with one at the first step, and with one in the
background, until it is committed. Printed per way: the median time that `save` holds up training, the median time by
which the round as a whole is longer than the one without, and the ratio of the two with a 95 % interval.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from lazypipe.model.config import ModelConfig
from lazypipe.model.transformer import Transformer, count_parameters
from lazypipe.pipeline.bench.options import Parser, check_at_least, exit_code
from lazypipe.pipeline.bench.timing import interleaved
from lazypipe.stages.contract import Context, UserError
from lazypipe.stages.pretrain.checkpoint.saver import CheckpointSaver
from lazypipe.stages.pretrain.checkpoint.state import RunState
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.optimizer import build_optimizer

VOCAB, NUM_HEADS = 8192, 8


class Rounds:
    """Rounds of one model's training steps, with a checkpoint after the first step or without."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.steps, self.folder, self.number = options.steps, folder, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = ModelConfig(
            hidden_size=options.hidden_size, num_layers=options.num_layers, num_heads=NUM_HEADS, mixer="standard"
        )
        self.model = Transformer(config, VOCAB).to(self.device)
        self.optimizer = build_optimizer(self.model, PretrainConfig())
        self.tokens = torch.randint(VOCAB, (4, 256), device=self.device)
        context = Context(folder, folder)
        self.savers = {
            way: CheckpointSaver(context, in_background=way == "background") for way in ("at once", "background")
        }
        self.held: dict[str, list[float]] = {way: [] for way in self.savers}  # seconds that `save` took

    def run(self, way: str) -> float:
        """Seconds of a round: its steps and what `save` holds them up. A save in the background is waited for after."""
        saver = self.savers.get(way)
        began = time.perf_counter()
        for step in range(self.steps):
            loss = self.model(self.tokens).logsumexp(-1).mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            loss.item()
            if step == 0 and saver is not None:
                before = time.perf_counter()
                self.number += 1
                saver.save(self.model, self.optimizer, RunState(step=self.number), {})
                self.held[way].append(time.perf_counter() - before)
        seconds = time.perf_counter() - began
        if saver is not None:
            saver.wait()
        return seconds

    def checkpoint_bytes(self) -> int:
        return sum(p.stat().st_size for p in max(self.folder.glob("checkpoints/step-*")).iterdir())


def main(arguments: Sequence[str]) -> int:
    parser = Parser("checkpoint", __doc__)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: the temporary directory")
    options = parser.parse_args(arguments)
    check_at_least(options, hidden_size=1, num_layers=1, steps=1, rounds=1)
    if options.hidden_size % (2 * NUM_HEADS):
        raise UserError(f"--hidden-size {options.hidden_size}: must be a multiple of {2 * NUM_HEADS}")
    if options.folder is not None and not options.folder.is_dir():
        raise UserError(f"--folder {options.folder}: is no folder; create it first")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rounds = Rounds(options, Path(folder))
        times = interleaved({way: partial(rounds.run, way) for way in ("none", *rounds.savers)}, options.rounds)
        size = rounds.checkpoint_bytes()
        for saver in rounds.savers.values():
            saver.__exit__(None)
    print(
        f"{count_parameters(rounds.model)[0] / 1e6:.1f} M parameters, checkpoint of {size / 1e6:.0f} MB, "
        f"{rounds.device.type}, {torch.get_num_threads()} threads; a step takes "
        f"{1000 * times.median('none') / options.steps:.0f} ms"
    )
    for way in rounds.savers:
        held = statistics.median(rounds.held[way][1:])  # the first round allocates buffers
        longer = statistics.median(a - b for a, b in zip(times.seconds[way], times.seconds["none"], strict=True))
        print(
            f"{way:10}  held up {1000 * held:.0f} ms, round longer by {1000 * longer:.0f} ms, "
            f"{times.ratio(way, 'none').text(3)} of one without"
        )
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
