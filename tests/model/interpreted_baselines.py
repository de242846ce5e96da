"""Trains and decodes baselines in Triton's interpreter: `TRITON_INTERPRET=1 python this.py model STEPS MIXER`,
or takes one through the stages: `python this.py stages FOLDER MIXER`. Prints what it measured as JSON.

Two things keep the package's kernels from running there, neither of their mathematics: its autotuners ask for a GPU's
driver, and its loop counters, plain ints in the interpreter, have no method `to`.
"""

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from triton.runtime.autotuner import Autotuner

from lazypipe.model.baselines import build_model
from lazypipe.model.config import ModelConfig
from lazypipe.model.loss import next_token_loss
from lazypipe.stages.contract import Artifact, Interrupted
from lazypipe.stages.evaluate import stage as evaluate
from lazypipe.stages.evaluate.config import EvaluateConfig, ExtrapolationConfig
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.sparsity import stage as sparsity
from lazypipe.stages.sparsity.config import SparsityConfig
from tests.stages.pretrain.toy_training import context_in, tiny_run, toy_corpus


class Counter(int):
    def to(self, *_: Any) -> "Counter":
        return self


def first_config(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """Autotuner.run without a measurement."""
    self.nargs = dict(zip(self.arg_names, arguments, strict=False))
    return self.fn.run(*arguments, **{**keywords, **self.configs[0].all_kwargs()})


def main(what: str, argument: str, mixer: str) -> None:
    Autotuner.run = first_config
    import fla.ops.common.chunk_delta_h as delta
    import fla.ops.common.chunk_h as chunk

    for module in (sys.modules[delta.__name__], sys.modules[chunk.__name__]):
        vars(module)["range"] = lambda *bounds: map(Counter, builtins.range(*bounds))
    print(json.dumps(measure(mixer, int(argument)) if what == "model" else through_the_stages(mixer, Path(argument))))


def measure(mixer: str, steps: int) -> dict[str, Any]:
    config = ModelConfig.model_validate({"mixer": mixer, "hidden_size": 32, "num_layers": 1, "num_heads": 2})
    model = build_model(config, vocab_size=11)
    tokens = torch.arange(17)[None] % 11
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = next_token_loss(model, tokens)
        loss.backward()
        moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        whole, cache = model(tokens), model.new_cache(17)
        parts = [model(tokens[:, :9], cache), *(model(tokens[:, i : i + 1], cache) for i in range(9, 17))]
        other = tokens.clone()
        other[0, 10] = 1 - other[0, 10] % 2
        changed = model(other)
        packed = 0.0
        if mixer != "mamba2":
            together = model(tokens, cu_seqlens=torch.tensor([0, 6, 17], dtype=torch.int32))
            alone = torch.cat([model(tokens[:, :6]), model(tokens[:, 6:])], dim=1)
            packed = (together - alone).abs().max().item()
    return {
        "losses": losses,
        "without_gradient": sorted({name for name, _ in model.named_parameters()} - moved),
        "decoding_error": (torch.cat(parts, dim=1) - whole).abs().max().item(),
        "packing_error": packed,
        "past_changed": (changed - whole)[:, :10].abs().max().item(),
        "future_changed": (changed - whole)[:, 10:].abs().max().item(),
    }


def through_the_stages(mixer: str, folder: Path) -> dict[str, Any]:
    """Pretraining, once whole and once stopped after a step and resumed; evaluation and analysis of the result."""
    torch.set_num_threads(1)
    corpus = toy_corpus(folder / "corpus")
    small = {"steps": 3, "seq_len": 16, "tokens_per_step": 32, "micro_batch_size": 2, "validation_windows": 2}
    config = tiny_run(mixer, **small, warmup_steps=0)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 1})})
    whole, stopped = context_in(folder / "whole"), context_in(folder / "stopped")
    outputs = pretrain.run(config, {"tokenize": corpus}, whole)
    (stopped.scratch_dir / "stop").touch()
    try:
        pretrain.run(config, {"tokenize": corpus}, stopped)
    except Interrupted:
        (stopped.scratch_dir / "stop").unlink()
    resumed = pretrain.run(config, {"tokenize": corpus}, stopped)
    weights = [load_file(context.output_dir / "checkpoint" / "model.safetensors") for context in (whole, stopped)]
    manifest = {"facts": outputs.facts.to_json(), "metrics": outputs.metrics, "config": config.model_dump(mode="json")}
    inputs = {"tokenize": corpus, "pretrain": Artifact(whole.output_dir, manifest)}
    asked = EvaluateConfig(
        extrapolation=ExtrapolationConfig(context_lengths=(16,)),
        max_tokens=32,
        prompts=("the",),
        max_new_tokens=3,
        batch_tokens=32,
    )
    scores = evaluate.run(asked, inputs, context_in(folder / "evaluate"))
    analysed = sparsity.run(SparsityConfig(windows=1, seq_len=16), inputs, context_in(folder / "sparsity"))
    continued = json.loads((folder / "evaluate" / "output" / "tables" / "continuations.json").read_text())
    return {
        "resumed_from": resumed.facts.resumed_from,
        "resumed_equal": all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]),
        "validation_loss": outputs.metrics["validation_loss"],
        "evaluated_loss": scores.metrics["validation_loss"],
        "continuations": len(continued),
        "attention_layers": analysed.facts.attention_layers,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
