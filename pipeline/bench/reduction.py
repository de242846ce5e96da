"""What ordered sums cost: `lazypipe bench reduction [--workers N] [--parameters N] [--micro-batches N ...]`.

Processes on this machine (gloo) reduce the gradients of a step as training does, without computing any: once by an
all-reduce, once in the order of the micro-batches, in turns. Prints what a worker sends, the median seconds of a step,
and their ratio with a 95 % interval.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from lazypipe.pipeline.bench.options import Parser, check_at_least, exit_code
from lazypipe.pipeline.bench.timing import Timings, interleaved, timed
from lazypipe.stages.data.batches import share_of_worker
from lazypipe.stages.pretrain.ordered_sum import OrderedSum


def bytes_sent(parameters: int, workers: int, micro_batches: int) -> tuple[int, int]:
    """(ring all-reduce, ordered): what a worker sends for a step's float32 gradients."""
    share = 4 * parameters * (workers - 1) // workers
    return 2 * share, (-(-micro_batches // workers) + 1) * share


def measure(parameters: int, micro_batches: int, rounds: int) -> Timings:
    """ "all-reduce" and "ordered" on the processes of the default group, which all begin together."""
    workers, rank = dist.get_world_size(), dist.get_rank()
    gradient = torch.randn(parameters)

    def ordered() -> None:
        total = OrderedSum()
        for number, _ in enumerate(share_of_worker(micro_batches, rank, workers)):
            total.add([gradient], min(workers, micro_batches - number * workers))
        total.result()

    calls = {"all-reduce": lambda: dist.all_reduce(gradient.clone()), "ordered": ordered}
    return interleaved({name: timed(call, prepare=dist.barrier) for name, call in calls.items()}, rounds)


def _worker(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=options.workers)
    for micro_batches in options.micro_batches:
        times = measure(options.parameters, micro_batches, options.repeats)
        if rank == 0:
            sent = [f"{count / 2**20:.0f}" for count in bytes_sent(options.parameters, options.workers, micro_batches)]
            seconds = [f"{times.median(name):.3f}" for name in ("all-reduce", "ordered")]
            cells = [micro_batches, *sent, *seconds, times.ratio("ordered", "all-reduce").text(2)]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    dist.destroy_process_group()


def main(arguments: Sequence[str]) -> int:
    parser = Parser("reduction", __doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8, 16], help="per optimizer step")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    check_at_least(options, workers=1, parameters=1, micro_batches=1, repeats=1)
    print(f"{options.workers} workers, {options.parameters} float32 gradients, torch {torch.__version__}, gloo\n")
    print("| micro-batches | MiB sent, all_reduce | MiB sent, ordered | s, all_reduce | s, ordered | ratio (95 %) |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        entries = [(rank, options, str(Path(folder) / "rendezvous")) for rank in range(options.workers)]
        processes = [context.Process(target=_worker, args=entry) for entry in entries]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    return int(any(process.exitcode for process in processes))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
