"""Training with torch.compile: the losses of plain training, its own bits again after a stop, and what it needs."""

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lazypipe.model.checkpoint import load_checkpoint
from lazypipe.model.mixers.registry import MIXERS
from lazypipe.stages.contract import Artifact, Interrupted, UserError
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.checks import check_compiler
from tests.stages.pretrain.toy_training import context_in, tiny_run
from tests.stages.pretrain.worker_runs import Run, train_here, train_on, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def losses_of(directory: Path) -> list[float]:
    rows = json.loads((directory / "output" / "tables" / "history.json").read_text(encoding="utf-8"))
    return [row["loss"] for row in rows]


@pytest.fixture
def compiler() -> None:
    try:
        check_compiler(CPU)
    except UserError as missing:
        pytest.skip(str(missing))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("mixer", "dtype", "mode"),
    [
        ("lazy", "float32", "none"),
        *(
            pytest.param(mixer, dtype, mode, marks=pytest.mark.long)
            for mixer in ("standard", "lazy")
            for dtype in ("float32", "bfloat16")
            for mode in ("none", "block", "selective")
            if (mixer, dtype, mode) != ("lazy", "float32", "none")
        ),
    ],
)
def test_a_compiled_run_learns_the_same_and_repeats_itself(
    corpus: Artifact, tmp_path: Path, mixer: str, dtype: str, mode: str
) -> None:
    plain, whole, stopped = (tmp_path / name for name in ("plain", "whole", "stopped"))
    fields = {"dtype": dtype, "activation_checkpointing": mode}
    config = tiny_run(mixer, compile=True, **fields)
    pretrain.run(tiny_run(mixer, **fields), {"tokenize": corpus}, context_in(plain))
    torch.compiler.reset()
    counters.clear()
    pretrain.run(config, {"tokenize": corpus}, context_in(whole))
    assert losses_of(whole) == pytest.approx(losses_of(plain), abs=1e-4 if dtype == "float32" else 2e-2)
    assert counters["stats"]["unique_graphs"] == 1

    context = context_in(stopped)
    (context.scratch_dir / "stop").touch()
    with pytest.raises(Interrupted, match="step 1 of 12"):
        pretrain.run(config, {"tokenize": corpus}, context)
    (context.scratch_dir / "stop").unlink()
    torch.compiler.reset()
    pretrain.run(config, {"tokenize": corpus}, context)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(stopped)[name]), name
    assert load_checkpoint(whole / "output" / "checkpoint").model(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()


@pytest.mark.long
@pytest.mark.usefixtures("compiler")
def test_every_variant_of_an_experiment_in_one_process_is_compiled(corpus: Artifact, tmp_path: Path) -> None:
    """torch compiles eight kinds of one function and then no more, without a word."""
    for mixer in list(MIXERS)[:10]:
        counters.clear()
        config = tiny_run(mixer, compile=True, steps=1, warmup_steps=0)
        pretrain.run(config, {"tokenize": corpus}, context_in(tmp_path / mixer))
        assert counters["stats"]["unique_graphs"] >= 1, mixer


@pytest.mark.long
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("parallel", ["replicate", "fsdp"])
@pytest.mark.parametrize("mixer", ["standard", "lazy"])
def test_two_workers_compile_what_one_does(
    corpus: Artifact, tmp_path: Path, mixer: str, parallel: str, mode: str
) -> None:
    fields = {"compile": True, "reduction": "ordered", "activation_checkpointing": mode}
    one = Run(tmp_path / "one", tiny_run(mixer, **fields))
    many = Run(tmp_path / "many", tiny_run(mixer, **fields, parallel=parallel))
    train_here(corpus.path.parent, one)
    train_on(corpus.path.parent, [many], 2, tmp_path / "rendezvous")
    for name, weight in weights_of(one.directory).items():
        assert torch.equal(weight, weights_of(many.directory)[name]), name


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_missing_compiler_is_named(device: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(UserError, match=f"the compiler {variable}=no-such-compiler is missing; install it, or .*false"):
        check_compiler(torch.device(device))
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"a compiler, g(\+\+|cc or clang), is missing"):
        check_compiler(torch.device(device))


def test_a_missing_compiler_is_refused_before_there_is_a_model(
    corpus: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delattr(pretrain, "build_model")
    with pytest.raises(UserError, match="no-such-compiler"):
        pretrain.run(tiny_run("standard", compile=True), {"tokenize": corpus}, context_in(tmp_path))
