"""A tiny experiment on generated text, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

TINY = """
name: tiny
storage: {{root: {root}}}
tokenize:
  source: {{kind: files, paths: ["{corpus}/*.txt"]}}
  tokenizer: {{kind: train, vocab_size: 300}}
  validation_fraction: 0.2
model: {{hidden_size: 32, num_layers: 2, num_heads: 2, max_seq_len: 32}}
variants:
  lazy: {{mixer: lazy, max_bias_length: 16}}
  standard: {{mixer: standard}}
pretrain: {{steps: 60, seq_len: 32, tokens_per_step: 256, micro_batch_size: 4, warmup_steps: 5, checkpoint_every: 10,
            validation_windows: 4, validate_every: 20}}
evaluate: {{extrapolation: {{context_lengths: [16, 64]}}, max_tokens: 512, max_new_tokens: 4, prompts: ["the"]}}
sparsity: {{windows: 2, seq_len: 32}}
"""
LINE = "the king and queen of night do love thy crown but sleep in blood o lord my sword shall speak to thee"
WORDS = LINE.split()


def write_corpus(folder: Path, documents: int = 12, words: int = 400, seed: int = 0) -> Path:
    """Text files of random words: enough structure for a loss to fall, the same bytes on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number in range(documents):
        text = " ".join(rng.choice(WORDS) for _ in range(words))
        (folder / f"document {number:02d}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def write_experiment(folder: Path, root: Path | None = None, corpus: Path | None = None) -> Path:
    path = folder / "tiny.yaml"
    text = TINY.format(root=root or folder / "output", corpus=corpus or write_corpus(folder / "corpus"))
    path.write_text(text, encoding="utf-8")
    return path


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment of a user who has set nothing: no tracking server, no Ray address, no token."""
    names = (
        "MLFLOW_TRACKING_URI",
        "LAZYPIPE_HOME",
        "RAY_ADDRESS",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_MODE",
        "TRITON_INTERPRET",
    )
    environment = {key: value for key, value in os.environ.items() if key not in names}
    return environment | {"OMP_NUM_THREADS": "2", "COLUMNS": "200"} | extra


def lazypipe(
    *arguments: str | Path, timeout: float = 240, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, in `folder` or in the checkout."""
    command = [str(Path(sys.executable).with_name("lazypipe")), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@dataclass(frozen=True)
class FinishedRun:
    config: Path
    root: Path
    output: str


def mlflow_runs(root: Path) -> list[Any]:
    """All runs of the tiny experiment below a root, newest first."""
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"]))


def current_manifest(root: Path, stage: str, variant: str | None = None) -> dict[str, Any]:
    """The manifest of the current generation of a stage and variant."""
    for entry in (root / "store" / stage).iterdir():
        if (entry / "current").exists():
            manifest = json.loads((entry / (entry / "current").read_text().strip() / "manifest.json").read_text())
            if manifest["variant"] == variant:
                return dict(manifest)
    raise AssertionError(f"nothing stored for {stage} {variant}")
