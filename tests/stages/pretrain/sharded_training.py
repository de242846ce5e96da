"""A worker of a run whose model is sharded with FSDP2 on the CPU: what it saves, and what it finds when it resumes."""

import resource
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lazypipe.model.transformer import Transformer
from lazypipe.stages.pretrain.checkpoint.saver import CheckpointSaver
from lazypipe.stages.pretrain.checkpoint.state import RunState
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.optimizer import build_optimizer
from tests.stages.pretrain.toy_training import context_in, tiny_run

VOCAB = 64
IDENTITY = {"seed": 0}
WHOLE = StateDictOptions(full_state_dict=True)


def built(config: PretrainConfig, sharded: bool, seed: int) -> tuple[Transformer, torch.optim.AdamW]:
    model = Transformer(config.model, VOCAB, seed)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, build_optimizer(model, config)


def train(model: Transformer, optimizer: torch.optim.AdamW, steps: int) -> None:
    tokens = torch.arange(32).reshape(1, 32) % VOCAB
    for _ in range(steps):
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_state(model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Weights and moments, gathered from the shards."""
    return {
        "model": get_model_state_dict(model, options=WHOLE),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE)["state"],
    }


def save_and_resume(directory: Path, rank: int, world_size: int, expected: Path | None) -> None:
    """Without `expected`: train, fail to save (worker 1's disk is full), save. With it: resume and compare."""
    torch.set_num_threads(1)
    rendezvous = directory / f"rendezvous-{world_size}-{expected is not None}"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    config = tiny_run("lazy")
    with CheckpointSaver(context_in(directory, rank, world_size)) as saver:
        model, optimizer = built(config, sharded=True, seed=0 if expected is None else 5)
        state = saver.resume(model, optimizer, IDENTITY)
        if expected is None:
            assert state.step == 0
            train(model, optimizer, 1)
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, -1))
            saver.save(model, optimizer, RunState(step=1), IDENTITY)
            train(model, optimizer, 1)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                saver.wait()
            assert any("no checkpoint of step 1: [Errno 27]" in str(w.message) for w in caught), [*map(str, caught)]
            assert rank != 0 or not list(saver.folder.iterdir())  # worker 0 sweeps
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            torch.manual_seed(100 + rank)
            saver.save(model, optimizer, RunState(step=2, history=[{"step": 1.0, "loss": None}]), IDENTITY)
            gathered = whole_state(model, optimizer)
            if rank == 0:
                torch.save((gathered, torch.randn(3)), directory / "expected.pt")
            train(model, optimizer, 3)  # while the save may be under way
        else:
            assert (state.step, state.history) == (2, [{"step": 1.0, "loss": None}])
            gathered, drawn = torch.load(expected)
            found = whole_state(model, optimizer)
            if rank == 0:
                torch.testing.assert_close(found, gathered, rtol=0, atol=0)
                assert torch.equal(torch.randn(3), drawn)
    dist.destroy_process_group()
