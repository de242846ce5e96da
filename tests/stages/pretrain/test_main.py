"""`python -m lazypipe.stages.pretrain` in real processes: few libraries, signals, resumes, torchrun, refusals."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lazypipe.stages.contract import Artifact, Context, UserError, file_sha256
from lazypipe.stages.overrides import apply_overrides
from lazypipe.stages.pretrain import __main__ as pretrain_command
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.config import PretrainConfig
from tests.stages.pretrain.toy_training import context_in, tiny_run, toy_corpus

PROJECT = Path(__file__).parents[3]
NOT_NEEDED = (
    *("ray", "mlflow", "datasets", "tokenizers", "transformers", "ruamel", "typer", "rich", "psutil"),
    *("matplotlib", "jinja2", "lm_eval", "sentencepiece", "huggingface_hub"),
)
BLOCKED = f"""
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_NEEDED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
runpy.run_module("lazypipe.stages.pretrain", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tokenize result with the manifest that the store would write."""
    artifact = toy_corpus(tmp_path_factory.mktemp("corpus"), documents=12)
    files = {
        file.relative_to(artifact.path).as_posix(): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(artifact.path.rglob("*"))
        if file.is_file()
    }
    manifest = {**artifact.manifest, "stage": "tokenize", "files": files}
    (artifact.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return Artifact(artifact.path, manifest)


def write_config(folder: Path, **fields: Any) -> tuple[PretrainConfig, Path]:
    config = tiny_run("lazy", **fields)
    path = folder / "config.json"
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    return config, path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*command: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=PROJECT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def steps_logged(output: Path) -> list[int]:
    file = output / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_a_stopped_command_goes_on_to_the_weights_of_an_undisturbed_run(
    corpus: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM, then the same command again, in processes that cannot import what a GPU box lacks."""
    config, file = write_config(tmp_path, steps=150, checkpoint_every=1000, validate_every=75)
    output = tmp_path / "out"
    command = ("-c", BLOCKED, file, "--tokens", corpus.path, "--output", output, "--threads", "1")
    first = start(*command)
    wait_for(lambda: (output / "metrics.jsonl").exists() and len(steps_logged(output)) > 20, first)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=100)
    assert first.returncode == 143, (out, err)
    stopped = int(re.search(r"stopped at step (\d+) of 150; its state is saved; the same command goes on", out)[1])
    assert 20 <= stopped < 150 and not (output / "result.json").exists()

    second = start(*command)
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, (out, err)
    assert "steps 150/150  loss " in out and "ETA 0:00:00" in out and "validation_loss" in out
    result = json.loads((output / "result.json").read_text())
    assert result["facts"]["resumed_from"] == stopped
    assert [entry["from_step"] for entry in result["facts"]["attempts"]] == [0, stopped]
    assert f"Interrupted: pretraining stopped at step {stopped}" in result["facts"]["attempts"][1]["cause"]
    assert steps_logged(output) == [*range(1, 151)]
    assert not (output / "scratch").exists()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    outputs = pretrain.run(config, {"tokenize": corpus}, context_in(tmp_path / "undisturbed"))
    torch.set_num_threads(threads)
    assert outputs.metrics["validation_loss"] == result["metrics"]["validation_loss"]
    expected = load_file(tmp_path / "undisturbed" / "output" / "checkpoint" / "model.safetensors")
    for name, tensor in load_file(output / "checkpoint" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name

    arguments = [str(file), "--tokens", str(corpus.path), "--output", str(output)]
    assert pretrain_command.main(arguments) == 0
    assert "is trained already: validation loss" in capsys.readouterr().out
    assert pretrain_command.main([*arguments, "log_every=7"]) == 0
    assert pretrain_command.main([*arguments, "lr=0.5"]) == 2
    assert "holds a finished run with lr=0.01, not 0.5" in capsys.readouterr().err


def test_ctrl_c_saves_and_leaves(
    corpus: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, file = write_config(tmp_path)
    honest = pretrain_command.CommandContext.log_metrics

    def interrupted(self: Any, step: int, metrics: Any) -> None:
        honest(self, step, metrics)
        if step == 3:
            Context(self.output_dir, self.scratch_dir, rank=1).write_warning("the disk is slow", step)
            warnings.warn("a library says", stacklevel=1)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(pretrain_command.CommandContext, "log_metrics", interrupted)
    before = signal.getsignal(signal.SIGINT)
    arguments = [str(file), "--tokens", str(corpus.path), "--output", str(tmp_path / "out")]
    assert pretrain_command.main(arguments) == 130
    assert signal.getsignal(signal.SIGINT) == before
    said = capsys.readouterr()
    assert "stopped at step 4 of 12" in said.out
    warned = ["warning: step 3: the disk is slow (rank 1)", "warning: a library says"]
    assert sorted(said.err.splitlines()) == sorted(warned), "as soon as they are written, of all ranks"
    assert pretrain_command.main(arguments) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["facts"]["resumed_from"] == 4
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(warned)
    assert {(w["message"], w["step"], *w["ranks"]) for w in result["warnings"]} == {
        ("the disk is slow", 3, 1),
        ("a library says", None, 0),
    }


def as_torchrun_starts_it(rank: int, world_size: int, port: int, arguments: list[str]) -> None:
    """What a worker process of its own runs: the command, in the environment that torchrun gives it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.exit(pretrain_command.main(arguments))


def test_several_processes_stop_at_one_step_and_one_alone_goes_on(corpus: Artifact, tmp_path: Path) -> None:
    """SIGTERM reaches one of two workers only; then a run of another number of workers takes over."""
    _, file = write_config(tmp_path, steps=2000, checkpoint_every=5000, validate_every=2000)
    output = tmp_path / "out"
    arguments = [str(file), "--tokens", str(corpus.path), "--output", str(output)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    workers = [server.Process(target=as_torchrun_starts_it, args=(rank, 2, port, arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 100
    while not ((output / "metrics.jsonl").exists() and len(steps_logged(output)) > 10):
        assert workers[0].is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    workers[1].terminate()
    for worker in workers:
        worker.join(100)
    assert [worker.exitcode for worker in workers] == [143, 143]
    stopped = len(steps_logged(output))
    assert steps_logged(output) == [*range(1, stopped + 1)]
    (output / "scratch" / "stop").touch()  # of an earlier request: it no longer holds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_command.CommandContext, "log_metrics", stop_after(stopped + 3))
        assert pretrain_command.main(arguments) == 143
    assert steps_logged(output) == [*range(1, stopped + 5)]


def stop_after(step: int) -> Any:
    """A log_metrics that sends this process SIGTERM once a step is logged."""
    honest = pretrain_command.CommandContext.log_metrics

    def log_metrics(self: Any, now: int, metrics: Any) -> None:
        honest(self, now, metrics)
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return log_metrics


@pytest.mark.long
def test_torchrun_passes_a_signal_on_to_all_workers(corpus: Artifact, tmp_path: Path) -> None:
    _, file = write_config(tmp_path, steps=1500, checkpoint_every=5000, validate_every=3000)
    output = tmp_path / "out"
    arguments = ("-m", "lazypipe.stages.pretrain", file, "--tokens", corpus.path, "--output", output)
    run = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments)
    wait_for(lambda: (output / "metrics.jsonl").exists() and len(steps_logged(output)) > 10, run)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=100)
    assert run.returncode != 0
    stopped = int(re.search(r"stopped at step (\d+) of 1500", out)[1])
    assert out.count("its state is saved") == 1, (out, err)
    assert steps_logged(output) == [*range(1, stopped + 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr=fast"], "lr: must be a valid number, unable to parse string as a number, found 'fast'"),
        (["learning_rate=1"], "learning_rate: unknown key"),
        (["model.num_layer=1"], "model.num_layer: unknown key; did you mean 'num_layers'?"),
        (["model.num_heads=5"], "model: num_heads=5 does not divide"),
        (["tokens_per_step=100"], "tokens_per_step=100 is not a multiple"),
        (["lr"], "override 'lr': expected key=value"),
        (["lr.x=1"], "lr is 0.01, not a mapping"),
        (["seq_len=64", "model.max_seq_len=32"], "seq_len=64 is above model.max_seq_len=32"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--workers", "2"], "unrecognized arguments: --workers"),
        (["--tokens", "/nowhere"], "--tokens /nowhere: holds no result"),
        (["--output", "/dev/null/x"], "--output /dev/null/x: cannot be written"),
    ],
)
def test_bad_input_is_one_clear_line(
    corpus: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    _, file = write_config(tmp_path)
    given = [str(file), "--tokens", str(corpus.path), "--output", str(tmp_path / "out"), *arguments]
    assert pretrain_command.main(given) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.startswith("error: ") and found.err.count("\n") == 1
    assert message in found.err


def test_overrides_read_as_those_of_lazypipe_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, file = write_config(tmp_path, spike_sigma=3.0)
    given = ["lr=1e-3", "spike_sigma=null", "compile=true", "~warmup_steps", "model.pattern=[1]"]
    changed = pretrain_command.read_config(file, given)
    expected = apply_overrides(config.model_dump(mode="json"), given)
    assert changed == PretrainConfig.model_validate(expected)
    assert (changed.lr, changed.spike_sigma, changed.compile, changed.warmup_steps) == (1e-3, None, True, 50)
    assert changed.model.layer_mixers == ("standard", "lazy")
    with pytest.raises(UserError, match=r"override '~learning_rate': there is no such key to delete"):
        pretrain_command.read_config(file, ["~learning_rate"])
    with pytest.raises(UserError, match=r"override 'lr=\[1': value:1:3: not valid YAML"):
        pretrain_command.read_config(file, ["lr=[1"])
    monkeypatch.setitem(sys.modules, "lazypipe.stages.yaml_text", None)  # as where ruamel.yaml is missing
    with pytest.raises(UserError, match=r"override 'lr=1': values are read by ruamel.yaml, which is missing"):
        pretrain_command.read_config(file, ["lr=1"])
    assert pretrain_command.read_config(file, []) == config


def test_other_folders_and_damaged_tokens_are_refused(
    corpus: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = write_config(tmp_path)

    def refusal(tokens: Path, config: Path = file) -> str:
        code = pretrain_command.main([str(config), "--tokens", str(tokens), "--output", str(tmp_path / "out")])
        assert code == 2
        return capsys.readouterr().err

    (tmp_path / "list.json").write_text("[]")
    assert "expected the fields of a pretrain config, found list" in refusal(corpus.path, tmp_path / "list.json")
    assert "cannot be read as JSON" in refusal(corpus.path, tmp_path / "absent.json")
    copy = tmp_path / "tokens" / "g0001"
    shutil.copytree(corpus.path, copy)
    (tmp_path / "tokens" / "current").write_text("g0001\n")
    shard = copy / "train" / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "train/shard-00000.arrow does not match its sha256" in refusal(tmp_path / "tokens")
    manifest = {**corpus.manifest, "stage": "evaluate"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "is a result of evaluate, not of tokenize" in refusal(copy)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert "start several processes with torchrun, or unset" in refusal(corpus.path)


def test_two_commands_do_not_share_an_output(
    corpus: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, file = write_config(tmp_path)
    with pretrain_command.locked(tmp_path / "out", 0, 1):
        assert pretrain_command.main([str(file), "--tokens", str(corpus.path), "--output", str(tmp_path / "out")]) == 2
    assert "another process trains there" in capsys.readouterr().err
