"""What ordered sums cost: `lazypipe bench reduction [--workers N] [--parameters N] [--micro-batches N ...]`.

Processes on this machine (gloo) reduce the gradients of a step as training does, without computing any: once by an
all-reduce, once in the order of the micro-batches. Prints what a worker sends and the median seconds of a step, the two
measured in turn.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lazypipe.stages.data.batches import share_of_worker
from lazypipe.stages.pretrain.ordered_sum import OrderedSum

REPETITIONS = 15


def bytes_sent(parameters: int, workers: int, micro_batches: int) -> tuple[int, int]:
    """(ring all-reduce, ordered): what a worker sends for a step's float32 gradients."""
    share = 4 * parameters * (workers - 1) // workers
    return 2 * share, (-(-micro_batches // workers) + 1) * share


def measure(parameters: int, micro_batches: int) -> tuple[list[float], list[float]]:
    """Seconds of each repetition, (all-reduce, ordered), on the processes of the default group."""
    workers, rank = dist.get_world_size(), dist.get_rank()
    gradient = torch.randn(parameters)
    plain, ordered = [], []
    for _ in range(REPETITIONS + 1):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(gradient.clone())
        plain.append(time.perf_counter() - started)
        dist.barrier()
        started = time.perf_counter()
        total = OrderedSum()
        for number, _ in enumerate(share_of_worker(micro_batches, rank, workers)):
            total.add([gradient], min(workers, micro_batches - number * workers))
        total.result()
        ordered.append(time.perf_counter() - started)
    return plain[1:], ordered[1:]  # the first opens connections


def _worker(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=options.workers)
    for micro_batches in options.micro_batches:
        plain, ordered = map(statistics.median, measure(options.parameters, micro_batches))
        if rank == 0:
            sent = [f"{count / 2**20:.0f}" for count in bytes_sent(options.parameters, options.workers, micro_batches)]
            cells = [micro_batches, *sent, f"{plain:.3f}", f"{ordered:.3f}", f"{ordered / plain:.2f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8, 16], help="per optimizer step")
    options = parser.parse_args()
    print(f"{options.workers} workers, {options.parameters} float32 gradients, torch {torch.__version__}, gloo\n")
    print("| micro-batches | MiB sent, all_reduce | MiB sent, ordered | s, all_reduce | s, ordered | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        arguments = [(rank, options, str(Path(folder) / "rendezvous")) for rank in range(options.workers)]
        processes = [context.Process(target=_worker, args=entry) for entry in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
