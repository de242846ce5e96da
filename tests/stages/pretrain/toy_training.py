"""A corpus with structure small enough to learn in seconds, tokenized by the real stage, and tiny runs on it."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Artifact, Context
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.checkpoint.state import RunState
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.hardware import Machine
from lazypipe.stages.pretrain.optimizer import build_optimizer
from lazypipe.stages.pretrain.trainer import Trainer
from lazypipe.stages.tokenization import stage as tokenization
from lazypipe.stages.tokenization.config import TokenizeConfig

NOUNS, VERBS = ("king", "queen", "fool", "sword", "crown", "night"), ("loves", "fears", "finds", "speaks of")


def toy_corpus(directory: Path, documents: int = 60) -> Artifact:
    """Sentences of a small grammar, byte-level BPE of 300 tokens, a quarter held out."""
    rng = random.Random(0)
    texts = directory / "texts"
    texts.mkdir(parents=True)
    for number in range(documents):
        sentences = [f"the {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}." for _ in range(30)]
        (texts / f"{number:02d}.txt").write_text(" ".join(sentences), encoding="utf-8")
    config = TokenizeConfig.model_validate(
        {
            "source": {"kind": "files", "paths": [str(texts / "*.txt")]},
            "tokenizer": {"kind": "train", "vocab_size": 300},
            "validation_fraction": 0.25,
        }
    )
    context = context_in(directory)
    outputs = tokenization.run(config, {}, context)
    manifest = {"facts": outputs.facts.to_json(), "metrics": outputs.metrics}
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return read_artifact(directory)


def read_artifact(directory: Path) -> Artifact:
    return Artifact(directory / "output", json.loads((directory / "manifest.json").read_text(encoding="utf-8")))


def context_in(directory: Path, rank: int = 0, world_size: int = 1) -> Context:
    output, scratch = directory / "output", directory / "scratch"
    output.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    return Context(output, scratch, rank=rank, world_size=world_size, progress_interval_s=0)


def tiny_run(mixer: str, **fields: Any) -> PretrainConfig:
    """12 steps of two micro-batches of 4 windows of 32 tokens; 2 layers, 2 heads, d = 32."""
    model = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64, "max_bias_length": 16}
    training = {"steps": 12, "seq_len": 32, "tokens_per_step": 256, "micro_batch_size": 4, "warmup_steps": 3}
    intervals = {"checkpoint_every": 5, "validate_every": 6, "validation_windows": 8, "lr": 1e-2}
    return PretrainConfig.model_validate({"model": {**model, "mixer": mixer}, **training, **intervals, **fields})


def toy_trainer(
    config: PretrainConfig, model: Transformer, corpus: Artifact, context: Context, step: int = 0, **fields: Any
) -> Trainer:
    """A trainer of `model` before step `step` that saves nothing."""
    return Trainer(
        config=config,
        context=context,
        device=torch.device("cpu"),
        model=model,
        optimizer=build_optimizer(model, config),
        state=RunState(step=step),
        batches=pretrain.open_batches(config, corpus.path),
        machine=Machine(None, context.world_size, 0.0, None),
        save=lambda **_: None,
        **fields,
    )


def metric_lines(context: Context) -> list[Mapping[str, Any]]:
    lines = (context.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class DyingContext(Context):
    """Kills its process, with no chance to clean up, once step `die_at` is logged and a checkpoint committed."""

    die_at: int = 0

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log_metrics(step, metrics)
        if step == self.die_at:
            while not list(self.scratch_dir.glob("checkpoints/step-*")):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)


def train_in_a_process(
    corpus: Path,
    directory: Path,
    config: PretrainConfig,
    die_at: int = 0,
    rank: int = 0,
    world_size: int = 1,
    rendezvous: Path | None = None,
) -> None:
    """What a process of its own runs: pretrain with one thread, outputs to DIRECTORY/result-<rank>.json."""
    torch.set_num_threads(1)
    if rendezvous is not None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
        )
    plain = context_in(directory, rank, world_size)
    context = DyingContext(plain.output_dir, plain.scratch_dir, rank=rank, world_size=world_size)
    context.die_at = die_at
    outputs = pretrain.run(config, {"tokenize": read_artifact(corpus)}, context)
    result = {"facts": outputs.facts.to_json(), "metrics": outputs.metrics}
    (directory / f"result-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    if rendezvous is not None:
        torch.distributed.destroy_process_group()


def start_process(*arguments: object) -> BaseProcess:
    """Start `train_in_a_process(*arguments)`. Forked from a server that has imported torch once: 0.2 s, not 4."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "torch._dynamo"])  # which the first optimizer of a process imports
    process = server.Process(target=train_in_a_process, args=arguments)
    process.start()
    return process
