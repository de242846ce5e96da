"""Does a change leave training as it was, bit for bit? `make loss-compare`, or

    python tests/loss_compare.py [--against REVISION]      default HEAD~1; exit 1 names the first step that differs
    python tests/loss_compare.py --write                   the reference curves that the test suite compares with

Trains two tiny models, standard and lazy, on generated tokens: here, and in a git worktree of the other revision. One
thread, one process; the curves are losses and gradient norms as float64 in decimal, which a reader gets back exactly.
"""

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
REFERENCE = HERE.with_name("loss_curves.json")
MIXERS = ("standard", "lazy")
STEPS, VOCAB = 30, 61

Curves = dict[str, dict[str, Any]]


def curves() -> Curves:
    """By mixer: loss and grad_norm [steps], validation_loss, and the sha256 of the trained weights."""
    import torch

    if has_package():
        from lazypipe.stages.contract import Context
        from lazypipe.stages.pretrain.config import PretrainConfig
        from lazypipe.stages.pretrain.stage import run
    else:  # a revision from before the package `lazypipe`
        from stages.pretrain_config import PretrainConfig  # type: ignore

        from stages.contract import Context  # type: ignore
        from stages.pretrain import run  # type: ignore

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: Curves = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            corpus = generated_corpus(Path(folder) / "corpus")
            for mixer in MIXERS:
                output, scratch = Path(folder) / mixer / "output", Path(folder) / mixer / "scratch"
                output.mkdir(parents=True)
                scratch.mkdir()
                config = PretrainConfig.model_validate(settings(mixer))
                outputs = run(config, {"tokenize": corpus}, Context(output, scratch))
                lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                logged = [json.loads(line)["metrics"] for line in lines]
                found[mixer] = {
                    "loss": [numbers["loss"] for numbers in logged],
                    "grad_norm": [numbers["grad_norm"] for numbers in logged],
                    "validation_loss": outputs.metrics["validation_loss"],
                    "weights": weights_digest(output / "checkpoint" / "model.safetensors"),
                }
    finally:
        torch.set_num_threads(threads)
    return found


def has_package() -> bool:
    """Whether the revision in the working directory has the package `lazypipe`; before it stages/ was imported bare."""
    return (Path.cwd() / "lazypipe").is_dir()


def settings(mixer: str) -> dict[str, Any]:
    """30 steps of two micro-batches of 4 windows of 48 tokens; 2 layers, 2 heads, d = 32."""
    model = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 48, "max_bias_length": 16}
    batch = {"seq_len": 48, "tokens_per_step": 384, "micro_batch_size": 4}
    rates = {"steps": STEPS, "lr": 5e-3, "warmup_steps": 5}
    return {"model": {**model, "mixer": mixer}, **batch, **rates, "validation_windows": 8}


def generated_corpus(directory: Path) -> Any:
    """A tokenize artifact made without a tokenizer: a chain in which each token has five likely successors."""
    import numpy as np

    if has_package():
        from lazypipe.stages.contract import Artifact
        from lazypipe.stages.data.shards import ShardWriter, write_documents
    else:
        from stages.shards import ShardWriter, write_documents  # type: ignore

        from stages.contract import Artifact  # type: ignore

    state, stream = 1, list[int]()
    for _ in range(24_000):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        previous = stream[-1] if stream else 0
        stream.append((previous * 7 + (state >> 33) % 5 * 11 + 3) % VOCAB)
    for split, tokens in (("train", stream[:20_000]), ("validation", stream[20_000:])):
        writer = ShardWriter(directory / split, "shard", "uint16", shard_bytes=2**16)
        writer.append(np.array(tokens))
        writer.close()
        write_documents(directory / split / "docs.arrow", [])
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    source = {"kind": "files", "fingerprint": "generated", "files": 0, "documents": 0, "skipped_rows": 0, "bytes": 0}
    train = {"documents": 0, "tokens": 20_000, "bytes": 0, "shards": []}
    facts = {"vocab_size": VOCAB, "eos_id": 0, "eos_token": "", "token_dtype": "uint16", "source": source}
    return Artifact(directory, {"facts": {**facts, "splits": {"train": train}}, "metrics": {}})


def weights_digest(path: Path) -> str:
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def curves_of(tree: Path) -> Curves:
    """`curves` of the packages below `tree`, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, str(HERE), "--curves", str(tree)]
    result = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"error: training in {tree} failed:\n{result.stderr.strip()}")
    found: Curves = json.loads(result.stdout.splitlines()[-1])
    return found


def first_difference(ours: Curves, theirs: Curves) -> str | None:
    """Where two sets of curves part, in words; None when every bit is the same."""
    for mixer in MIXERS:
        here, there = ours[mixer], theirs[mixer]
        for step, values in enumerate(
            zip(here["loss"], there["loss"], here["grad_norm"], there["grad_norm"], strict=True)
        ):
            for name, a, b in (("loss", *values[:2]), ("grad_norm", *values[2:])):
                if a != b:
                    return f"{mixer}: step {step + 1}: {name} {a!r} here, {b!r} there ({a - b:+.3g})"
        for name in ("validation_loss", "weights"):
            if here[name] != there[name]:
                return f"{mixer}: after {STEPS} steps: {name} {here[name]!r} here, {there[name]!r} there"
    return None


def compare(repository: Path, revision: str) -> int:
    """Train in `repository` as it stands and in a worktree of `revision`; 0 when both give the same bits, else 1."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            print(f"error: git {' '.join(arguments)}: {result.stderr.strip()}", file=sys.stderr)
            raise SystemExit(2)
        return result.stdout.strip()

    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "other"
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            theirs = curves_of(tree)
        finally:
            git("worktree", "remove", "--force", str(tree))
    difference = first_difference(curves_of(repository), theirs)
    if difference is not None:
        print(f"differs from {revision} ({commit[:12]}): {difference}")
        return 1
    print(f"{STEPS} steps of {' and '.join(MIXERS)}: bitwise equal to {revision} ({commit[:12]})")
    return 0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Compare training with that of another revision, bit for bit.")
    parser.add_argument("--against", default="HEAD~1", metavar="REVISION")
    parser.add_argument("--repository", type=Path, default=HERE.parents[1], help="default: the one this file is in")
    parser.add_argument("--write", action="store_true", help=f"write {REFERENCE.name}")
    parser.add_argument("--curves", type=Path, help=argparse.SUPPRESS)  # what curves_of calls
    options = parser.parse_args(arguments)
    if options.curves is not None:
        stages = importlib.import_module("lazypipe.stages" if has_package() else "stages")
        if Path(str(stages.__file__)).resolve().parents[1] != options.curves.resolve():
            print(f"stages comes from {stages.__file__}, not from {options.curves}", file=sys.stderr)
            return 2
        print(json.dumps(curves()))
        return 0
    if options.write:
        REFERENCE.write_text(json.dumps(curves(), indent=1) + "\n", encoding="utf-8")
        return 0
    return compare(options.repository, options.against)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
