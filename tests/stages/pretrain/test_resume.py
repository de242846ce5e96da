"""Resume checkpoints: everything comes back, from any number of workers, and nothing untrusted is unpickled."""

import json
import multiprocessing
import pickle
import random
import resource
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Artifact, Context, UserError
from lazypipe.stages.pretrain.checkpoint import saver as checkpoint_saver
from lazypipe.stages.pretrain.checkpoint.directory import CHECKPOINT_MANIFEST, checkpoint_step, newest_checkpoint
from lazypipe.stages.pretrain.checkpoint.saver import CheckpointSaver
from lazypipe.stages.pretrain.checkpoint.state import RunState, run_identity, write_resume_checkpoint
from lazypipe.stages.pretrain.optimizer import build_optimizer
from lazypipe.stages.pretrain.parallel import from_first, together
from lazypipe.stages.random_states import random_states, set_random_states
from tests.stages.pretrain.sharded_training import IDENTITY, built, save_and_resume, train, whole_state
from tests.stages.pretrain.toy_training import context_in, tiny_run

CONFIG = tiny_run("lazy")


def trained(steps: int = 1, seed: int = 0) -> tuple[Transformer, torch.optim.AdamW]:
    model, optimizer = built(CONFIG, sharded=False, seed=seed)
    train(model, optimizer, steps)
    return model, optimizer


def saved_steps(context: Context) -> list[int]:
    return sorted(checkpoint_step(path) for path in (context.scratch_dir / "checkpoints").iterdir())


def resumed(context: Context, identity: dict[str, Any] = IDENTITY) -> tuple[Transformer, torch.optim.AdamW, RunState]:
    model, optimizer = trained(steps=0, seed=5)
    with CheckpointSaver(context) as saver:
        state = saver.resume(model, optimizer, identity)
    return model, optimizer, state


@pytest.mark.parametrize("in_background", [True, False])
def test_everything_comes_back(tmp_path: Path, in_background: bool) -> None:
    context, (model, optimizer) = context_in(tmp_path), trained(3)
    state = RunState(
        step=3,
        loss=1.5,
        nonfinite_steps=1,
        nonfinite_in_a_row=1,
        spikes_skipped=2,
        recent_losses=[2.5],
        recent_norms=[0.5],
        train_seconds=3.5,
        wait_seconds=0.5,
        history=[{"step": 2.0, "loss": None}, {"step": 3.0, "loss": 0.1}],
    )
    with CheckpointSaver(context, in_background=in_background) as saver:
        saver.save(model, optimizer, state, IDENTITY)
        expected = whole_state(model, optimizer)
        drawn = torch.randn(2), np.random.rand(2).tolist(), random.random()
    other, other_optimizer, found = resumed(context)
    assert found == state
    torch.testing.assert_close(whole_state(other, other_optimizer), expected, rtol=0, atol=0)
    assert torch.equal(torch.randn(2), drawn[0]) and (np.random.rand(2).tolist(), random.random()) == drawn[1:]
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    assert torch.equal(model.embedding.weight, other.embedding.weight)


def test_what_decides_the_weights_is_named_field_by_field(corpus: Artifact) -> None:
    """As the checkpoints of earlier versions have it: JSON values, defaults included, operational fields left out."""
    config = tiny_run("lazy", log_every=3)
    config = config.model_copy(update={"model": config.model.model_copy(update={"pattern": (1,)})})
    fields = run_identity(config, corpus)
    dumped = json.loads(config.model_dump_json())
    model = {f"model.{name}": value for name, value in dumped.pop("model").items()}
    assert fields["model.pattern"] == [1] and fields["model.norm_eps"] == config.model.norm_eps
    assert model.items() <= fields.items()
    left_out = {"log_every", "kernel", "parallel", "reduction", "checkpoint_every", "compile", "deterministic"}
    assert left_out.isdisjoint(fields) and "lr" in fields
    others = {"corpus.fingerprint", "corpus.vocab_size", "corpus.train_tokens"}
    assert {name: fields[name] for name in fields.keys() - model.keys() - others}.items() <= dumped.items()


def test_filters_of_warnings_are_those_of_before_when_training_is_left(tmp_path: Path) -> None:
    before = list(warnings.filters)
    model, optimizer = trained()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with CheckpointSaver(context_in(tmp_path)) as saver:
            saver.save(model, optimizer, RunState(step=1), IDENTITY)
            saver.save(model, optimizer, RunState(step=2), IDENTITY, final=True)
    assert [str(one.message) for one in caught] == []
    assert list(warnings.filters) == before


@pytest.mark.parametrize("error", [UserError("too few"), OSError("full"), KeyError("a mistake of ours")])
def test_one_worker_raises_its_own_error(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        from_first(fail, rank=0, world_size=1)
    assert raised.value is error
    assert together(lambda: 3, world_size=1) == [3]


def test_random_states_come_back_in_the_middle_of_a_pair_of_gaussians() -> None:
    np.random.seed(3)
    random.seed(3)
    np.random.randn()  # both draw gaussians in pairs and keep the second
    random.gauss(0, 1)
    states = {name: state.clone() for name, state in random_states().items()}
    expected = np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)], torch.rand(3)
    set_random_states(states)
    assert (np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)]) == expected[:2]
    assert torch.equal(torch.rand(3), expected[2])


def test_a_save_in_the_background_holds_the_state_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write waits until training has gone three steps on; the next save and the end wait for it."""
    gone_on = threading.Event()
    write = write_resume_checkpoint

    def late(*arguments: Any) -> Any:
        assert gone_on.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_saver, "write_resume_checkpoint", late)
    context, (model, optimizer) = context_in(tmp_path), trained(2)
    expected = {"model": {name: tensor.clone() for name, tensor in model.state_dict().items()}}
    state = RunState(step=2, history=[{"step": 2.0}])
    with CheckpointSaver(context) as saver:
        saver.save(model, optimizer, state, IDENTITY)
        train(model, optimizer, 3)
        torch.manual_seed(9)
        state.step, state.history = 5, [*state.history, {"step": 5.0}]
        assert newest_checkpoint(saver.folder) is None
        gone_on.set()
    other, _, found = resumed(context)
    assert (found.step, found.history) == (2, [{"step": 2.0}])
    torch.testing.assert_close(dict(other.state_dict()), expected["model"], rtol=0, atol=0)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)


def test_a_step_that_was_skipped_leaves_the_optimizer_as_new(tmp_path: Path) -> None:
    context, (model, optimizer) = context_in(tmp_path), trained(0)
    with CheckpointSaver(context) as saver:
        saver.save(model, optimizer, RunState(step=1), IDENTITY)
    assert not optimizer.state
    _, other_optimizer, state = resumed(context)
    assert state.step == 1 and not other_optimizer.state


def test_a_parameter_without_a_gradient_so_far_has_no_moments_afterwards_either(tmp_path: Path) -> None:
    context, (model, optimizer) = context_in(tmp_path), trained(0)
    model(torch.arange(8).reshape(1, 8)).sum().backward()
    name, unused = next((n, p) for n, p in model.named_parameters() if n.endswith("bias"))
    unused.grad = None
    optimizer.step()
    optimizer.zero_grad()
    with CheckpointSaver(context) as saver:
        saver.save(model, optimizer, RunState(step=1), IDENTITY)
    other, other_optimizer, _ = resumed(context)
    without = [n for n, p in other.named_parameters() if not other_optimizer.state.get(p)]
    assert without == [name]


# ---- what is not to be trusted


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_tampered_metadata_is_refused_before_it_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, (model, optimizer) = context_in(tmp_path), trained()
    with CheckpointSaver(context) as saver:
        for step in (1, 2):
            saver.save(model, optimizer, RunState(step=step), IDENTITY)
    trace, bomb = tmp_path / "exploded", pickle.dumps(Bomb(tmp_path / "exploded"))
    pickle.loads(bomb)
    assert trace.exists(), "the bomb is one"
    trace.unlink()

    newest = context.scratch_dir / "checkpoints" / "step-00000002"
    (newest / ".metadata").write_bytes(bomb)
    with pytest.warns(UserWarning, match=r"step-00000002 is damaged \(.*\.metadata has"):
        assert resumed(context)[2].step == 1
    # Even if it is damaged only after worker 0 has verified the checkpoint, as all workers see it.
    monkeypatch.setattr(checkpoint_saver, "newest_checkpoint", lambda *_: newest)
    with pytest.raises(UserError, match=r"step-00000002 is damaged: .*/\.metadata has"):
        resumed(context)
    assert not trace.exists()


def test_a_checkpoint_of_an_earlier_format_or_of_another_model_is_refused(tmp_path: Path) -> None:
    context, (model, optimizer) = context_in(tmp_path), trained()
    with CheckpointSaver(context) as saver:
        saver.save(model, optimizer, RunState(step=1), IDENTITY, final=True)
        other = Transformer(CONFIG.model.model_copy(update={"num_layers": 1}), 64)
        before = other.embedding.weight.clone()
        with pytest.raises(UserError, match=r"does not fit the model: layers\.1\..*expected None; delete"):
            saver.resume(other, build_optimizer(other, CONFIG), IDENTITY)
        assert torch.equal(other.embedding.weight, before)
    manifest = context.scratch_dir / "checkpoints" / "step-00000001" / CHECKPOINT_MANIFEST
    old = {name: value for name, value in json.loads(manifest.read_text()).items() if name != "format"}
    manifest.write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"step-00000001 has format 1, this version reads 2; delete .*checkpoints"):
        resumed(context)


def test_a_field_that_a_checkpoint_does_not_know_was_at_its_default(tmp_path: Path) -> None:
    identity = {"seed": 0, "model.lazy_rope": True, "document_masking": False}
    context, (model, optimizer) = context_in(tmp_path), trained()
    with CheckpointSaver(context) as saver:
        saver.save(model, optimizer, RunState(step=3), {"seed": 0})
    assert resumed(context, identity)[2].step == 3
    for name, value in (("model.lazy_rope", False), ("document_masking", True), ("seed", 1)):
        with pytest.raises(UserError, match=rf"written with {name}={not value}|seed=0, this run has {name}={value}"):
            resumed(context, {**identity, name: value})


# ---- a disk that takes no more


@contextmanager
def full_disk(bytes_left: int = 5000) -> Iterator[None]:
    """Files cannot grow beyond `bytes_left`: the operating system's own refusal (EFBIG), in place of ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("bytes_left", [0, 5000])
def test_a_full_disk_costs_one_checkpoint_and_no_more(tmp_path: Path, in_background: bool, bytes_left: int) -> None:
    context, (model, optimizer) = context_in(tmp_path), trained()
    with CheckpointSaver(context, in_background=in_background) as saver:
        saver.save(model, optimizer, RunState(step=1), IDENTITY)
        saver.wait()
        with full_disk(bytes_left), pytest.warns(UserWarning, match=r"no checkpoint of step 2: \[Errno 27\]"):
            saver.save(model, optimizer, RunState(step=2), IDENTITY)
            saver.wait()
        assert saved_steps(context) == [1], "neither a half checkpoint, nor the one before lost"
        with (
            full_disk(bytes_left),
            pytest.raises(OSError, match=r"state at step 3 cannot be saved .*Errno 27.*make room"),
        ):
            saver.save(model, optimizer, RunState(step=3), IDENTITY, final=True)
        saver.save(model, optimizer, RunState(step=4), IDENTITY)
    assert saved_steps(context) == [1, 4]
    assert resumed(context)[2].step == 4


def test_metrics_wait_for_room_and_come_before_the_checkpoint(tmp_path: Path) -> None:
    context, (model, optimizer) = context_in(tmp_path), trained()
    context.log_metrics(1, {"loss": 1.0})
    with CheckpointSaver(context, in_background=False) as saver:
        with full_disk(60):
            context.log_metrics(2, {"loss": 0.5})
            context.progress(2, 9, "steps")
            with pytest.warns(UserWarning, match="no checkpoint of step 2"):
                saver.save(model, optimizer, RunState(step=2), IDENTITY)
        lines = (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1], "no half line"
        saver.save(model, optimizer, RunState(step=3), IDENTITY)
    lines = (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_any_other_error_of_a_save_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(checkpoint_saver, "write_resume_checkpoint", broken)
    context, (model, optimizer) = context_in(tmp_path), trained()
    with pytest.raises(TypeError, match="a mistake of ours"), CheckpointSaver(context) as saver:
        saver.save(model, optimizer, RunState(step=1), IDENTITY)
    assert saved_steps(context) == []


# ---- several workers


def test_shards_are_saved_by_their_owners_and_load_into_other_numbers_of_workers(tmp_path: Path) -> None:
    """FSDP2 on two workers, the second's disk full at first; resumed by three, and without sharding by one."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.stages.sharded_training"])

    def run(world_size: int, expected: Path | None) -> None:
        workers = [
            server.Process(target=save_and_resume, args=(tmp_path, rank, world_size, expected))
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(100)
        assert [worker.exitcode for worker in workers] == [0] * world_size

    run(2, None)
    saved = tmp_path / "scratch" / "checkpoints" / "step-00000002"
    manifest = json.loads((saved / CHECKPOINT_MANIFEST).read_text())
    sizes = [manifest["files"][f"__{rank}_0.distcp"]["size"] for rank in (0, 1)]
    assert manifest["world_size"] == 2 and max(sizes) < 0.7 * sum(sizes), "half of the state each"
    damaged = shutil.copytree(saved, saved.with_name("step-00000003"))  # worker 0 finds out; all fall back with it
    (damaged / "__1_0.distcp").unlink()
    run(3, tmp_path / "expected.pt")
    shutil.rmtree(damaged)
    gathered, _ = torch.load(tmp_path / "expected.pt")
    model, optimizer, _ = resumed(context_in(tmp_path))
    torch.testing.assert_close(whole_state(model, optimizer), gathered, rtol=0, atol=0)
