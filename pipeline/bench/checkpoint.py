"""What training pays for a resume checkpoint, written at once and in the background: `lazypipe bench checkpoint`.

Interleaved rounds of the same training steps without a checkpoint, with one at the first step, and with one in the
background, until it is committed. Printed per way: the median time that `save` holds up training, and the median time
by which the round as a whole is longer than the one without.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lazypipe.model.config import ModelConfig
from lazypipe.model.transformer import Transformer, count_parameters
from lazypipe.stages.contract import Context
from lazypipe.stages.pretrain.checkpoint.saver import CheckpointSaver
from lazypipe.stages.pretrain.checkpoint.state import RunState
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.optimizer import build_optimizer

VOCAB = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: the temporary directory")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Transformer(
        ModelConfig(hidden_size=asked.hidden_size, num_layers=asked.num_layers, num_heads=8, mixer="standard"), VOCAB
    ).to(device)
    tokens = torch.randint(VOCAB, (4, 256), device=device)
    ways = {"none": None, "at once": False, "background": True}
    held: dict[str, list[float]] = {way: [] for way in ways}
    whole: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        context = Context(Path(folder), Path(folder))
        optimizer = build_optimizer(model, PretrainConfig())
        savers = {way: CheckpointSaver(context, in_background=bool(background)) for way, background in ways.items()}
        for number in range(asked.rounds + 1):
            for way in ways:
                started = time.perf_counter()
                for step in range(asked.steps):
                    loss = model(tokens).logsumexp(-1).mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    loss.item()
                    if step == 0 and way != "none":
                        before = time.perf_counter()
                        savers[way].save(model, optimizer, RunState(step=number + 1), {})
                        if number > 0:  # the first round allocates buffers
                            held[way].append(time.perf_counter() - before)
                if number > 0:
                    whole[way].append(time.perf_counter() - started)
                savers[way].wait()
        files = [p.stat().st_size for p in max(Path(folder).glob("checkpoints/step-*")).iterdir()]
        for saver in savers.values():
            saver.__exit__(None)
    plain = statistics.median(whole["none"])
    print(
        f"{count_parameters(model)[0] / 1e6:.1f} M parameters, checkpoint of {sum(files) / 1e6:.0f} MB, {device.type}, "
        f"{torch.get_num_threads()} threads; a step takes {1000 * plain / asked.steps:.0f} ms"
    )
    for way in ("at once", "background"):
        longer = statistics.median(a - b for a, b in zip(whole[way], whole["none"], strict=True))
        print(f"{way:10}  held up {1000 * statistics.median(held[way]):.0f} ms, round longer by {1000 * longer:.0f} ms")


if __name__ == "__main__":
    main()
