"""`python -m lazypipe.stages.pretrain CONFIG.json --tokens DIR --output DIR [key=value ...]`: without Ray and MLflow.

Needs torch, numpy, pyarrow, safetensors and pydantic alone, and ruamel.yaml for overrides. One process trains by
itself; torchrun starts several that find each other through RANK, WORLD_SIZE and LOCAL_RANK (NCCL on CUDA, Gloo
elsewhere). The output folder is what the pretrain stage writes (checkpoint/, tables/, metrics.jsonl) with result.json
at the end and, until then, scratch/ with the resume checkpoints: the same command again goes on from the newest.

Exit codes: 0 trained (or was already), 2 something you can fix, 143 and 130 saved and left after SIGTERM and SIGINT.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist
from pydantic import BaseModel, ValidationError

from lazypipe.model.config import ModelConfig
from lazypipe.stages.attempts import ends_noted
from lazypipe.stages.contract import Artifact, Context, Interrupted, Outputs, UserError, nearest, write_atomically
from lazypipe.stages.facts import PretrainFacts, TokenizeFacts
from lazypipe.stages.files import files_problem
from lazypipe.stages.overrides import apply_overrides
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.checkpoint.state import other_identity, run_identity
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.determinism import prepare_cublas
from lazypipe.stages.pretrain.parallel import from_first
from lazypipe.stages.signals import handled_signals
from lazypipe.stages.warning_lines import read_warnings, warning_text

RESULT = "result.json"
PRINT_EVERY_S = 10.0


@dataclass
class CommandContext(Context):
    """A Context that prints its progress and the warnings of all ranks, and that a signal stops."""

    caught: list[int] = field(default_factory=list)
    _printed: set[tuple[str, int | None]] = field(default_factory=set, init=False, repr=False)
    _last_line: float = field(default=float("-inf"), init=False, repr=False)

    @property
    def stop_requested(self) -> bool:
        return bool(self.caught) or super().stop_requested

    def progress(self, done: float, total: float, unit: str, **numbers: float | str) -> None:
        super().progress(done, total, unit, **numbers)
        now = time.monotonic()
        if self.rank == 0 and (now - self._last_line >= PRINT_EVERY_S or done == total):
            self._last_line = now
            self.print_warnings()  # of the other ranks
            print(progress_line(done, total, unit, numbers), flush=True)

    def write_warning(self, message: str, step: int | None = None) -> None:
        super().write_warning(message, step)
        self.print_warnings()

    def print_warnings(self) -> None:
        """Print what was warned of and not printed yet; rank 0 does it for all."""
        if self.rank == 0:
            for entry in read_warnings(self.scratch_dir):
                if (key := (entry["message"], entry["step"])) not in self._printed:
                    self._printed.add(key)
                    _show_warning(warning_text(entry))


def progress_line(done: float, total: float, unit: str, numbers: Mapping[str, float | str]) -> str:
    """'steps 120/200  loss 4.31  tokens_per_s 8512  ETA 0:01:04'"""
    parts = [f"{unit} {done:g}/{total:g}"]
    for name, value in numbers.items():
        if name == "eta_s":
            minutes, seconds = divmod(round(float(value)), 60)
            parts.append(f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
        elif isinstance(value, str):
            parts.append(f"{name} {value}")
        else:
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) and value < 1e4 else f"{name} {value:.0f}")
    return "  ".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code. Messages of several processes are those of rank 0."""
    first = os.environ.get("RANK", "0") == "0"
    caught: list[int] = []
    try:
        with handled_signals(_remember(caught)), warnings.catch_warnings():
            warnings.showwarning = _show_warning if first else _ignore_warning
            train(parse(arguments), caught)
    except UserError as refusal:
        if first:
            print(f"error: {refusal}", file=sys.stderr, flush=True)
        return 2
    except Interrupted as interrupted:
        if first:
            print(f"{interrupted}; the same command goes on from there", flush=True)
        return 128 + (caught[0] if caught else signal.SIGTERM)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _remember(caught: list[int]) -> Callable[[int], None]:
    """The first signal asks for a checkpoint at the end of the step; another one ends a process that trains alone.

    Under torchrun a second one is usual: Ctrl-C reaches the workers from the terminal and from torchrun.
    """

    def handle(number: int) -> None:
        caught.append(number)
        if len(caught) > 1 and "WORLD_SIZE" not in os.environ:
            sys.exit(128 + number)

    return handle


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _ignore_warning(*_: object, **__: object) -> None:
    """Another rank says it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m lazypipe.stages.pretrain --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m lazypipe.stages.pretrain",
        description="Train one language model without Ray and MLflow; several processes through torchrun.",
    )
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.json", help="as lazypipe plan --print pretrain/VARIANT prints"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as lr=1e-3 or model.num_layers=2; ~key deletes"
    )
    parser.add_argument("--tokens", type=Path, required=True, metavar="DIR", help="a tokenize result of the store")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch on a CPU (default: torch's own choice)")
    options = parser.parse_intermixed_args(arguments)
    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads {options.threads}: must be at least 1")
    return options


def train(options: argparse.Namespace, caught: list[int]) -> None:
    """Read, check and train; UserError and Interrupted as `lazypipe.stages.pretrain.stage.run` raises them."""
    config = read_config(options.config, options.overrides)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if config.deterministic and torch.cuda.is_available():
        prepare_cublas(os.environ, False)  # before CUDA is used, as the next line does
    rank, world_size = join_workers()
    corpus = open_corpus(options.tokens, rank, world_size)
    output, scratch, identity = options.output, options.output / "scratch", run_identity(config, corpus)
    with locked(output, rank, world_size):
        result = from_first(lambda: finished_result(output, identity), rank, world_size)
        if result is not None:
            if rank == 0:
                print(f"{output} is trained already: validation loss {result['metrics']['validation_loss']:.4f}")
            return
        if rank == 0:
            scratch.mkdir(exist_ok=True)
            (scratch / "stop").unlink(missing_ok=True)
        context = CommandContext(output, scratch, rank, world_size, caught=caught)
        try:
            with context.routed_warnings(), ends_noted(scratch) if rank == 0 else nullcontext():
                outputs = pretrain.run(config, {"tokenize": corpus}, context)
        finally:
            context.print_warnings()
        if rank == 0:
            finish(output, identity, outputs)


def join_workers() -> tuple[int, int]:
    """(rank, world size): (0, 1) alone; under torchrun the process group is initialised and the GPU chosen."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    try:
        rank, world_size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE is set, but RANK, WORLD_SIZE and LOCAL_RANK are not three numbers ({error}); start several "
            "processes with torchrun, or unset WORLD_SIZE"
        ) from error
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return rank, world_size
    asked, present = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)), torch.cuda.device_count()
    if asked > present:
        raise UserError(f"{asked} processes on a machine with {present} GPUs; lower torchrun's --nproc-per-node")
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    return rank, world_size


def read_config(path: Path, overrides: Sequence[str]) -> PretrainConfig:
    """The PretrainConfig in a JSON file, changed by overrides (stages/overrides.py)."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON: {error}; write it with  lazypipe plan EXPERIMENT --print pretrain/VARIANT"
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected the fields of a pretrain config, found {type(fields).__name__}")
    fields = apply_overrides(fields, overrides)
    try:
        return PretrainConfig.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":
        return (f"{key}: " if key else "") + str(first["msg"]).removeprefix("Value error, ")
    if first["type"] != "extra_forbidden":
        return f"{key}: {first['msg'].replace('Input should be', 'must be')}, found {first['input']!r}"
    model: type[BaseModel] = ModelConfig if key.startswith("model.") else PretrainConfig
    return f"{key}: unknown key{nearest(str(first['loc'][-1]), model.model_fields)}"


def verified_corpus(path: Path) -> Path:
    """The directory of an intact tokenize result; UserError says what is wrong with another."""
    hint = "make it with  lazypipe run EXPERIMENT --only tokenize  and give its folder, store/tokenize/..."
    current = path / "current"
    try:
        directory = path / current.read_text(encoding="utf-8").strip() if current.is_file() else path
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        stage, files = manifest["stage"], dict(manifest["files"])
        facts = manifest["facts"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--tokens {path}: holds no result ({type(error).__name__}: {error}); {hint}") from error
    if stage != "tokenize":
        raise UserError(f"--tokens {path}: is a result of {stage}, not of tokenize; {hint}")
    TokenizeFacts.from_json(facts, f"--tokens {path}: its facts")
    problem = files_problem(directory, files)
    if problem is not None:
        raise UserError(f"--tokens {path}: {problem}; {hint}")
    return directory


def open_corpus(path: Path, rank: int, world_size: int) -> Artifact:
    """The tokenize generation at `path`, or the one that its `current` names; every file checked, by rank 0."""
    directory = from_first(lambda: verified_corpus(path), rank, world_size)
    return Artifact(directory, json.loads((directory / "manifest.json").read_text(encoding="utf-8")))


@contextmanager
def locked(output: Path, rank: int, world_size: int) -> Iterator[None]:
    """Make the output folder and keep a second command out of it."""
    handle: list[IO[str]] = []

    def lock() -> None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            handle.append((output / ".lock").open("w", encoding="utf-8"))
            fcntl.flock(handle[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output {output}: another process trains there; wait for it, or choose another"
            ) from None
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written: {error}; choose another") from error

    from_first(lock, rank, world_size)
    try:
        yield
    finally:
        for file in handle:
            file.close()


def finished_result(output: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier command left when it was done, or None. UserError when it trained something else."""
    path = output / RESULT
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    other = other_identity(found["identity"], identity)
    if other is not None:
        name, before, now = other
        raise UserError(f"--output {output}: holds a finished run with {name}={before}, not {now}; choose another")
    return found


def finish(output: Path, identity: Mapping[str, Any], outputs: Outputs[PretrainFacts]) -> None:
    """Write result.json, drop what only a resume needs, and say what came out."""
    scratch = output / "scratch"
    warned = read_warnings(scratch)
    result = {"identity": identity, "metrics": outputs.metrics, "facts": outputs.facts.to_json(), "warnings": warned}
    write_atomically(output / RESULT, json.dumps(result, indent=1) + "\n")
    shutil.rmtree(scratch)
    print("  ".join(f"{name} {value:.5g}" for name, value in outputs.metrics.items()))
    print(f"model: {output / 'checkpoint'}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
