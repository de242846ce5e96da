"""Artifacts of a tiny experiment, written by the project itself: random tokens and random weights, real files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lazypipe.model.checkpoint import save_checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.model.transformer import Transformer, count_parameters
from lazypipe.stages.contract import Artifact, Context
from lazypipe.stages.data.shards import ShardWriter, write_documents
from lazypipe.stages.pretrain.config import PretrainConfig
from tests.stages.made_facts import pretrain_facts, tokenize_facts

VOCAB_SIZE = 97


def context_in(directory: Path) -> Context:
    output, scratch = directory / "output", directory / "scratch"
    output.mkdir(parents=True)
    scratch.mkdir()
    return Context(output, scratch, progress_interval_s=0)


def tokenized(directory: Path, validation_tokens: int, seed: int = 0) -> Artifact:
    """A tokenize artifact whose validation split holds `validation_tokens` random tokens."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, validation_tokens)
    writer = ShardWriter(directory / "validation", "shard", "uint16", shard_bytes=2**20)
    writer.append(tokens)
    writer.close()
    write_documents(directory / "validation" / "docs.arrow", [])
    return Artifact(directory, {"facts": tokenize_facts(validation_tokens, vocab_size=VOCAB_SIZE), "metrics": {}})


def model_config(mixer: str, **fields: Any) -> ModelConfig:
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 64, "max_bias_length": 16}
    return ModelConfig.model_validate({**shape, "mixer": mixer, **fields})


def pretrained(directory: Path, model: Transformer, seed: int = 0) -> Artifact:
    """A pretrain artifact that holds `model`, as if trained from `seed`."""
    save_checkpoint(directory / "checkpoint", model, eos_id=0, tokenizer_json=None)
    config = PretrainConfig(model=model.config, seed=seed, seq_len=32, tokens_per_step=256)
    parameters, non_embedding = count_parameters(model)
    facts = pretrain_facts(parameters=parameters, non_embedding_parameters=non_embedding, steps=config.steps)
    return Artifact(directory, {"config": config.model_dump(mode="json"), "facts": facts, "metrics": {}})


def trained_looking(mixer: str, seed: int = 0, **fields: Any) -> Transformer:
    """A model whose projections are large enough for attention to prefer some keys clearly, as after training."""
    model = Transformer(model_config(mixer, **fields), VOCAB_SIZE, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(20)
    return model
