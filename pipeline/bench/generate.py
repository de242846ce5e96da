"""`lazypipe bench generate`: tokens per second of greedy decoding, with the cache and without.

Prompts are the first tokens of a pseudo-random sequence: what a model makes of them does not change how long it takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lazypipe.pipeline.bench.options import Parser, check_at_least, exit_code
from lazypipe.pipeline.bench.timing import interleaved, timed
from lazypipe.pipeline.commands.models import checkpoint_folder, load_trained
from lazypipe.stages.contract import UserError


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("generate", __doc__)
    parser.add_argument("target", type=Path, metavar="CHECKPOINT|CONFIG", help="checkpoint folder or experiment file")
    parser.add_argument("--variant", help="which of the experiment's models")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value")
    parser.add_argument("--root", help="where the experiment's results are stored")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences decoded at once")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    check_at_least(options, batch=1, prompt_tokens=1, new_tokens=1, repeats=1)
    return options


def main(arguments: Sequence[str]) -> int:
    """Print the table, or JSON. Each number is the median of interleaved repeats; reading the prompt is included."""
    import torch

    from lazypipe.model.generate import generate

    asked = parse(arguments)
    folder = checkpoint_folder(asked.target, asked.variant, asked.overrides, asked.root)
    checkpoint = load_trained(folder).checkpoint
    model = checkpoint.model
    too_long = model.config.too_long(asked.prompt_tokens + asked.new_tokens)
    if too_long is not None:
        raise UserError(f"--prompt-tokens and --new-tokens: {too_long}")
    device = model.embedding.weight.device
    drawn = torch.Generator().manual_seed(0)
    measures = {}
    for batch in asked.batch:
        prompt = torch.randint(model.vocab_size, (batch, asked.prompt_tokens), generator=drawn).to(device)
        for use_cache in (True, False):
            run = partial(generate, model, prompt, asked.new_tokens, use_cache=use_cache)
            measures[f"{batch}/{use_cache}"] = timed(run, device.type)
    times = interleaved(measures, asked.repeats)
    rows, ratios = [], []
    for batch in asked.batch:
        with_cache, without = (batch * asked.new_tokens / times.median(f"{batch}/{flag}") for flag in (True, False))
        rows.append({"batch": batch, "with_cache": with_cache, "without_cache": without})
        ratios.append(times.ratio(f"{batch}/False", f"{batch}/True"))
    about = {
        "checkpoint": str(folder),
        "mixers": sorted(set(model.config.layer_mixers)),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "prompt_tokens": asked.prompt_tokens,
        "new_tokens": asked.new_tokens,
    }
    if asked.json:
        print(json.dumps({**about, "tokens_per_s": rows}, indent=1))
        return 0
    print(
        f"{' and '.join(about['mixers'])}, {device.type} with {about['threads']} threads: {asked.new_tokens} new "
        f"tokens after {asked.prompt_tokens}, greedy"
    )
    print(f"{'batch':>5}  {'tokens/s with cache':>19}  {'without':>10}  {'ratio (95 %)':>16}")
    for row, ratio in zip(rows, ratios, strict=True):
        print(f"{row['batch']:>5}  {row['with_cache']:>19,.0f}  {row['without_cache']:>10,.0f}  {ratio.text(1):>16}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
