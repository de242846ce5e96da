"""Times Lazy Attention against softmax attention: `lazypipe bench kernels`.

Every number is a median over repetitions and input sets, implementations interleaved (timing.py). On CUDA times are
CUDA events and memory is torch's peak; on a CPU times are wall clock and memory is the growth of the process's peak,
taken in a process of its own. TFLOP/s count causal softmax attention's own products (2 forward, 5 backward), so that
all implementations do the same useful work.

Needs torch and triton alone: `python -m lazypipe.pipeline.bench.kernels` is the same command.
"""

import argparse
import importlib.util
import itertools
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lazypipe.pipeline.bench.kernel_cases import Inputs, Peer, make_inputs, outside_peer, peers_for
from lazypipe.pipeline.bench.kernel_report import format_table, write_plot
from lazypipe.pipeline.bench.options import Parser, check_at_least, check_writable, exit_code
from lazypipe.pipeline.bench.timing import interleaved, measured_peak, timed
from lazypipe.stages.contract import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "train", "decode")
# A materialised [L, L] needs six times B H L^2 values at once: from this many bytes for one on it is not attempted.
LARGEST_MATRIX = 2 << 30


class Case(NamedTuple):
    """One row group of the table."""

    mode: str
    batch: int
    heads: int
    length: int
    head_dim: int
    window: int
    steep_share: float
    dtype: str
    device: str
    threads: int


def case_inputs(case: Case, seed: int) -> Inputs:
    """Input set number `seed` of a case: square for forward and train, one query for decode."""
    query_len = 1 if case.mode == "decode" else case.length
    return make_inputs(
        seed, case.batch, case.heads, query_len, case.length, case.head_dim, case.window, case.steep_share,
        DTYPES[case.dtype], torch.device(case.device), case.mode == "train",
    )  # fmt: skip


def step(case: Case, peer: Peer, inputs: Inputs) -> Callable[[], Any]:
    """What is timed: a forward without gradients, or a forward and backward."""
    if case.mode != "train":

        def inference() -> Any:
            with torch.no_grad():
                return peer.call(inputs)

        return inference
    leaves = inputs[: peer.differentiates]
    return lambda: torch.autograd.grad(peer.call(inputs), leaves, inputs.grad_out)


def causal_flops(case: Case) -> float:
    """Floating-point operations of causal softmax attention in this mode."""
    queries = 1 if case.mode == "decode" else case.length
    pairs = case.length if case.mode == "decode" else queries * (queries + 1) / 2
    products = 7 if case.mode == "train" else 2
    return products * 2.0 * case.batch * case.heads * pairs * case.head_dim


def block_density(case: Case) -> dict[str, Any]:
    """rho, the share of causal blocks with a positive weight, as measured by our own backend at its own block size."""
    from lazypipe.kernels import lazy_attention

    inputs = case_inputs(case._replace(mode="forward"), 0)
    with torch.no_grad():
        _, stats = lazy_attention(*inputs[:5], return_stats=True)
    rows, columns = stats.block_size
    mask = stats.block_mask
    first_key = torch.arange(mask.shape[3], device=mask.device) * columns
    last_query = (torch.arange(mask.shape[2], device=mask.device) + 1) * rows - 1
    causal = first_key[None, :] <= last_query[:, None]
    rho = (mask & causal).sum().item() / (causal.sum().item() * mask.shape[0] * mask.shape[1])
    return {"rho": rho, "block_size": [rows, columns]}


def values_read(case: Case) -> float | None:
    """Share of the rows of V that our decode kernel reads; None where it does not run."""
    if case.mode != "decode" or case.device != "cuda":
        return None
    from lazypipe.kernels.gpu.ops import triton_decode

    x = case_inputs(case, 0)
    read = triton_decode(x.q, x.k, x.v, x.bias, x.tau, 0, case.head_dim**-0.5)[1]
    return float(read.sum()) / (case.batch * case.heads * case.length)


def run_case(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One result per implementation: median ms, its ratio to the fastest softmax, TFLOP/s, extra memory; a reason where
    it cannot run.
    """
    peers = peers_for(torch.device(case.device), case.length, case.mode == "decode", arguments.peer)
    sets = [case_inputs(case, seed) for seed in range(arguments.input_sets)]
    results: list[dict[str, Any]] = []
    runnable: dict[str, list[Callable[[], Any]]] = {}
    for peer in peers:
        entry: dict[str, Any] = {**case._asdict(), "peer": peer.name}
        results.append(entry)
        queries = 1 if case.mode == "decode" else case.length
        if peer.name == "reference" and case.batch * case.heads * queries * case.length * 4 >= LARGEST_MATRIX:
            entry["skipped"] = "one materialised matrix alone takes 2 GB or more"
            continue
        steps = [step(case, peer, x) for x in sets]
        try:
            steps[0]()
        except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
            entry["skipped"] = str(error).splitlines()[0][:160]
            continue
        runnable[peer.name] = steps
    times = interleaved({name: timed(steps, case.device) for name, steps in runnable.items()}, arguments.repeats)
    softmax = min((name for name in runnable if name.startswith("sdpa")), key=times.median, default=None)
    density = block_density(case) if case.mode != "decode" else {}
    share = values_read(case)
    for entry in results:
        if entry["peer"] not in runnable:
            continue
        entry.update(density)
        entry["ms"] = 1e3 * times.median(entry["peer"])
        if softmax is not None:
            ratio = times.ratio(entry["peer"], softmax)
            entry["vs_sdpa"] = {"median": ratio.median, "low": ratio.low, "high": ratio.high}
        entry["tflops"] = causal_flops(case) / entry["ms"] / 1e9
        if share is not None and entry["peer"] == "triton":
            entry["values_read"] = share
        if not arguments.no_memory:
            entry["extra_mb"] = peer_memory(case, entry["peer"], arguments.peer)
    return results


def peer_memory(case: Case, name: str, outside: list[str]) -> float | None:
    """Peak extra MB of one call: torch's counter on CUDA; on a CPU in a fresh process, None when that fails."""
    if case.device == "cuda":
        return one_peak(case, name, outside)
    request = json.dumps([case._asdict(), name, outside])
    done = subprocess.run(
        [sys.executable, "-m", "lazypipe.pipeline.bench.kernels", "--one-peak", request],
        capture_output=True,
        text=True,
        check=False,
    )
    return float(done.stdout) if done.returncode == 0 else None


def one_peak(case: Case, name: str, outside: list[str]) -> float:
    """Peak extra MB of one call in this process."""
    torch.set_num_threads(case.threads)
    peers = peers_for(torch.device(case.device), case.length, case.mode == "decode", outside)
    peer = next(p for p in peers if p.name == name)
    small = case._replace(length=min(256, case.length))
    inputs = case_inputs(case, 0)
    return measured_peak(step(small, peer, case_inputs(small, 0)), step(case, peer, inputs), case.device)


def environment(device: str) -> dict[str, str]:
    """What the numbers were taken on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "not installed"
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        found["driver"] = done.stdout.strip().splitlines()[0] if done.returncode == 0 else "unknown"
    else:
        found["machine"] = platform.machine()
        found["threads"] = str(torch.get_num_threads())
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; its defaults are the table of docs/benchmarks.md for the device at hand."""
    cuda = torch.cuda.is_available()
    parser = Parser("kernels", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--length", type=int, nargs="+", default=[2**i for i in range(10, 17)] if cuda else [2048, 8192]
    )
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128] if cuda else [64])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16 if cuda else 8)
    parser.add_argument("--window", type=int, nargs="+", default=[512])
    parser.add_argument(
        "--steep-share", type=float, nargs="+", default=[0.0, 0.75], help="share of local heads: the dial"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16" if cuda else "fp32")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5)
    parser.add_argument("--input-sets", type=int, default=3 if cuda else 2)
    parser.add_argument("--peer", action="append", default=[], metavar="MODULE:FUNCTION")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement")
    parser.add_argument(
        "--matmul-tflops", type=float, help="bound of the device's matrix products, for the share column"
    )
    parser.add_argument("--tune", action="store_true", help="first time every candidate tile and store the best (CUDA)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one-peak", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """UserError for what is wrong with a request, before anything is timed."""
    sizes = ("length", "head_dim", "window", "batch", "heads", "threads", "repeats", "input_sets")
    check_at_least(options, **dict.fromkeys(sizes, 1))
    for share in options.steep_share:
        if not 0 <= share <= 1:
            raise UserError(f"--steep-share {share}: expected 0 to 1, the share of heads that attend locally")
    if options.matmul_tflops is not None and not options.matmul_tflops > 0:
        raise UserError(f"--matmul-tflops {options.matmul_tflops}: expected a positive number")
    for name in options.peer:
        try:
            outside_peer(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--peer {name}: {error}") from error
    check_writable("--json", options.json)
    check_writable("--plot", options.plot)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib; install it or leave --plot out")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible; use --device cpu")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every combination that is asked for, in the table's order."""
    sizes = (options.mode, options.head_dim, options.window, options.length, options.steep_share)
    for mode, head_dim, window, length, share in itertools.product(*sizes):
        yield Case(
            mode, options.batch, options.heads, length, head_dim, window, share, options.dtype, options.device,
            options.threads,
        )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, print the table, write JSON and plot where asked. UserError for a bad request."""
    options = parse(arguments)
    if options.one_peak:
        fields, name, outside = json.loads(options.one_peak)
        print(one_peak(Case(**fields), name, outside))
        return 0
    check(options)
    torch.set_num_threads(options.threads)
    bound = options.matmul_tflops or matmul_tflops(DTYPES[options.dtype], options.device)
    results: list[dict[str, Any]] = []
    for case in cases(options):
        if options.tune and options.device == "cuda" and case.steep_share == options.steep_share[0]:
            from lazypipe.kernels.gpu.tuning import tune

            tune(case_inputs(case._replace(mode="train"), 0)[:5])
        results += run_case(case, options)
    record = {"environment": environment(options.device), "matmul_tflops": bound, "results": results}
    print(format_table(record))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        write_plot(record, options.plot)
    return 0


def matmul_tflops(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of a large square product here and now: the bound that shares are taken of."""
    size = 8192 if device == "cuda" else 2048
    x = torch.randn(size, size, device=device).to(dtype)
    return 2.0 * size**3 / interleaved({"matmul": timed(lambda: x @ x, device)}, 10).median("matmul") / 1e12


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
