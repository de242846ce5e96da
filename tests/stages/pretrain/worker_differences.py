"""How far several workers end from one.

    python -m tests.stages.worker_differences [--dtype bfloat16] [--workers 2 4] [--lr 3e-3]

The table of docs/pretraining.md, "Ordered sums": 50 steps on a toy corpus, one thread per worker, differences from one
process with the same `reduction`.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch

from tests.stages.pretrain.toy_training import tiny_run, toy_corpus
from tests.stages.pretrain.worker_runs import Run, result_of, train_here, train_on, weights_of


def differences(one: Path, many: Path) -> tuple[float, float, float]:
    """Largest of a weight, of the final validation loss, and of the first gradient relative to its norm."""
    expected, found = weights_of(one), weights_of(many)
    weight = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    loss = result_of(many)["metrics"]["validation_loss"] - result_of(one)["metrics"]["validation_loss"]
    first, other = (torch.load(directory / "first_gradient-0.pt") for directory in (one, many))
    return weight, loss, float((first - other).norm() / first.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--lr", type=float, default=1e-2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = list(itertools.product(("standard", "lazy"), ("replicate", "fsdp"), ("all_reduce", "ordered")))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        corpus = toy_corpus(base / "corpus").path.parent

        def run(name: str, mixer: str, parallel: str, reduction: str) -> Run:
            fields = {"steps": 50, "tokens_per_step": 5 * 128, "lr": options.lr, "dtype": options.dtype}
            return Run(base / name, tiny_run(mixer, **fields, parallel=parallel, reduction=reduction))

        for mixer, _, reduction in kinds[::4] + kinds[1::4]:
            train_here(corpus, run(f"{mixer}-{reduction}", mixer, "replicate", reduction))
        print("| | workers | reduction | weights | validation loss | first gradient |\n|---|---|---|---|---|---|")
        for workers in options.workers:
            runs = {kind: run(f"{workers}-{'-'.join(kind)}", *kind) for kind in kinds}
            train_on(corpus, list(runs.values()), workers, base / f"rendezvous-{workers}")
            for (mixer, parallel, reduction), found in runs.items():
                numbers = differences(base / f"{mixer}-{reduction}", found.directory)
                cells = [f"{mixer}, {parallel}", str(workers), reduction, *(f"{number:.1e}" for number in numbers)]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
