"""What forming the logits in chunks costs in time: `lazypipe bench loss [--tokens N] [--vocab-size N] ...`.

Forward and backward of the loss of N tokens over V entries with d channels, float32, in turns: full logits, our chunks
(model/chunked_loss.py), and torch.nn.functional.linear_cross_entropy with chunks of as many tokens. Prints the median
seconds of each, and their ratio to full logits. Memory: tests/model/test_chunked_loss.py.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.chunked_loss import losses_in_chunks, losses_of_logits


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--chunk-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, options.channels, generator=generator).requires_grad_()
    matrix = (0.02 * torch.randn(options.vocab_size, options.channels, generator=generator)).requires_grad_()
    targets = torch.randint(options.vocab_size, (options.tokens,), generator=generator)
    settings = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=options.chunk_tokens)
    loops: dict[str, Callable[[], Tensor]] = {
        "full logits": lambda: losses_of_logits(F.linear(hidden, matrix), targets).objective,
        "chunks": lambda: losses_in_chunks(hidden, matrix, targets, options.chunk_tokens).objective,
        "linear_cross_entropy": lambda: F.linear_cross_entropy(hidden, matrix, targets, options=settings),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.repeats + 1):
        for name, loss in loops.items():
            hidden.grad = matrix.grad = None
            began = time.perf_counter()
            loss().backward()  # type: ignore[no-untyped-call]
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first makes buffers
    print(
        f"{options.tokens} tokens over {options.vocab_size} entries, {options.channels} channels, float32, "
        f"{options.threads} threads, torch {torch.__version__}"
    )
    for name, median in medians.items():
        print(f"{name:<22}{median:>8.3f} s{median / medians['full logits']:>8.2f}")


if __name__ == "__main__":
    main()
