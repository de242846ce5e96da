"""`deterministic` sets torch's switches for the run and puts them back; on a CPU it changes no bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lazypipe.model.mixers.registry import MIXERS
from lazypipe.stages.contract import Artifact, UserError
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.determinism import CUBLAS, deterministic, prepare_cublas
from tests.stages.pretrain.toy_training import context_in, tiny_run, toy_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return toy_corpus(tmp_path_factory.mktemp("corpus"), documents=12)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_mechanism_trains_with_it_to_the_same_bits(corpus: Artifact, tmp_path: Path, mixer: str) -> None:
    weights = []
    for asked in (False, True):
        folder = tmp_path / str(asked)
        config = tiny_run(mixer, steps=2, warmup_steps=0, deterministic=asked)
        pretrain.run(config, {"tokenize": corpus}, context_in(folder))
        weights.append(load_file(folder / "output" / "checkpoint" / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_the_switches_hold_for_the_run_alone() -> None:
    seen: list[tuple[bool, tuple[bool, bool, bool]]] = []

    def state() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.deterministic

    torch.backends.cudnn.benchmark = True
    try:
        before = state()
        for asked in (False, True):
            with pytest.raises(RuntimeError, match="failed"), deterministic(asked, "standard", pytest.fail):
                seen.append((asked, state()))
                raise RuntimeError("failed")
            assert state() == before
        assert seen == [(False, before), (True, (True, False, True))]
    finally:
        torch.backends.cudnn.benchmark = False


def test_cublas_gets_its_workspace_in_time_or_a_refusal() -> None:
    environment: dict[str, str] = {}
    prepare_cublas(environment, initialized=False)
    assert environment == {CUBLAS: ":4096:8"}
    prepare_cublas(environment, initialized=True)
    prepare_cublas({CUBLAS: ":16:8"}, initialized=True)
    with pytest.raises(UserError, match="is not set, and this process uses CUDA already; start with"):
        prepare_cublas({}, initialized=True)
    with pytest.raises(UserError, match="is ':0:0'; start with CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        prepare_cublas({CUBLAS: ":0:0"}, initialized=False)


def test_on_cuda_the_workspace_is_asked_for(corpus: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delenv(CUBLAS, raising=False)
    with pytest.raises(UserError, match="uses CUDA already"):
        pretrain.run(tiny_run("standard", deterministic=True), {"tokenize": corpus}, context_in(tmp_path))
