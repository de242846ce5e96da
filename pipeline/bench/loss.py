"""What forming the logits in chunks costs in time: `lazypipe bench loss [--tokens N] [--vocab-size N] ...`.

Forward and backward of the loss of N tokens over V entries with d channels, float32, in turns: full logits, our chunks
(model/loss.py), and torch.nn.functional.linear_cross_entropy with chunks of as many tokens. Prints the median
seconds of each, and their ratio to full logits with a 95 % interval. Memory: tests/model/test_chunked_loss.py.
"""

import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lazypipe.model.loss import losses_in_chunks, losses_of_logits
from lazypipe.pipeline.bench.options import Parser, check_at_least, exit_code
from lazypipe.pipeline.bench.timing import interleaved, timed


def main(arguments: Sequence[str]) -> int:
    parser = Parser("loss", __doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--chunk-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    check_at_least(options, **dict.fromkeys(vars(options), 1))
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, options.channels, generator=generator).requires_grad_()
    matrix = (0.02 * torch.randn(options.vocab_size, options.channels, generator=generator)).requires_grad_()
    targets = torch.randint(options.vocab_size, (options.tokens,), generator=generator)
    settings = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=options.chunk_tokens)
    losses: dict[str, Callable[[], Tensor]] = {
        "full logits": lambda: losses_of_logits(F.linear(hidden, matrix), targets).objective,
        "chunks": lambda: losses_in_chunks(hidden, matrix, targets, options.chunk_tokens).objective,
        "linear_cross_entropy": lambda: F.linear_cross_entropy(hidden, matrix, targets, options=settings),
    }

    def forget_gradients() -> None:
        hidden.grad = matrix.grad = None

    def forward_and_backward(loss: Callable[[], Tensor]) -> Callable[[], float]:
        return timed(lambda: loss().backward(), prepare=forget_gradients)  # type: ignore[no-untyped-call]

    times = interleaved({name: forward_and_backward(loss) for name, loss in losses.items()}, options.repeats)
    print(
        f"{options.tokens} tokens over {options.vocab_size} entries, {options.channels} channels, float32, "
        f"{options.threads} threads, torch {torch.__version__}"
    )
    for name in losses:
        print(f"{name:<22}{times.median(name):>8.3f} s    {times.ratio(name, 'full logits').text(2)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
