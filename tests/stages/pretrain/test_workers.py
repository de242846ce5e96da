"""One, two and four workers, replicated and sharded: the same micro-batches, and with ordered sums the same bits."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lazypipe.model.transformer import Transformer
from lazypipe.pipeline.bench.reduction import bytes_sent
from lazypipe.stages.contract import Artifact
from lazypipe.stages.data.batches import share_of_worker
from lazypipe.stages.pretrain.checks import warn_of_settings
from lazypipe.stages.pretrain.config import PretrainConfig
from tests.stages.pretrain.toy_training import tiny_run
from tests.stages.pretrain.worker_runs import Run, result_of, train_here, train_on, weights_of, windows_read

pytestmark = pytest.mark.usefixtures("one_thread")

MICRO_BATCHES = 3  # of 4 windows of 32 tokens: neither two workers nor four divide them
STEPS = 50


def config(mixer: str, **fields: object) -> PretrainConfig:
    batch = {"tokens_per_step": MICRO_BATCHES * 128, "validate_every": 20, "validation_windows": 12}
    return tiny_run(mixer, **{"steps": STEPS, **batch, **fields})


def hybrid(config: PretrainConfig) -> PretrainConfig:
    """`config` with four layers, every second of them standard attention."""
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 4, "pattern": "even"})})


def sharded(config: PretrainConfig, **fields: object) -> PretrainConfig:
    return config.model_copy(update={"parallel": "fsdp", **fields})


SHORT = {"steps": 8, "reduction": "ordered"}
# Models whose blocks hand on more than the residual stream: values to the layers above, head masses to the loss.
HANDING_ON = {
    "elliptical": config("elliptical", **SHORT),
    "elliptical-even": hybrid(config("elliptical", **SHORT)),
    "sink": config("sink", sink_balance=0.5, **SHORT),
    "sink-even": hybrid(config("sink", sink_balance=0.5, **SHORT)),
}


@pytest.fixture(scope="module")
def alone(corpus: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The directories of undisturbed one-process runs by (mixer or name, reduction)."""
    base = tmp_path_factory.mktemp("alone")
    runs = {}
    for name, short in HANDING_ON.items():
        runs[name, "ordered"] = base / name
        train_here(corpus.path.parent, Run(runs[name, "ordered"], short))
    for mixer in ("standard", "lazy"):
        for reduction in ("all_reduce", "ordered"):
            runs[mixer, reduction] = base / f"{mixer}-{reduction}"
            one = config(mixer, reduction=reduction)
            if (mixer, reduction) == ("lazy", "all_reduce"):  # of which the first gradient is all that is compared
                one = config(mixer, steps=1, warmup_steps=0)
            train_here(corpus.path.parent, Run(runs[mixer, reduction], one))
    return runs


@pytest.fixture(scope="module")
def two_workers(corpus: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base directory of all runs of two workers, each below it by name."""
    base = tmp_path_factory.mktemp("two")
    kinds = {
        "standard-replicate-ordered": config("standard", reduction="ordered"),
        "standard-replicate-all_reduce": config("standard"),
        "lazy-replicate-first": config("lazy", steps=1, warmup_steps=0),
        "lazy-fsdp-first": config("lazy", steps=1, warmup_steps=0, parallel="fsdp"),
    }
    kinds |= {f"{name}-fsdp": sharded(short) for name, short in HANDING_ON.items()}
    runs = [Run(base / name, entry) for name, entry in kinds.items()]
    runs.append(Run(base / "2-1-2", config("lazy", reduction="ordered"), stop_at=11))
    runs.append(Run(base / "fsdp-1-fsdp", config("lazy", reduction="ordered", parallel="fsdp"), stop_at=11))
    train_on(corpus.path.parent, runs, 2, base / "rendezvous")
    return base


def assert_same_bits(expected: Path, found: Path) -> None:
    one, other = weights_of(expected), weights_of(found)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
    for metric in ("loss", "validation_loss"):
        assert result_of(expected)["metrics"][metric] == result_of(found)["metrics"][metric]


def largest_difference(one: Path, other: Path) -> float:
    expected, found = weights_of(one), weights_of(other)
    return max(float((expected[name] - found[name]).abs().max()) for name in expected)


@given(st.integers(1, 40), st.integers(1, 12))
@settings(deadline=None, derandomize=True)
def test_workers_share_out_every_batch_once_and_go_through_equally_many_rounds(batches: int, workers: int) -> None:
    shares = [share_of_worker(batches, rank, workers) for rank in range(workers)]
    assert {len(share) for share in shares} == {-(-batches // workers)}
    in_order = [number for together in zip(*shares, strict=True) for number in together]
    assert [number for number in in_order if number is not None] == list(range(batches))
    assert None not in in_order[:batches], "only the last round is idle, and only its last workers"


def test_ordered_sums_send_more_with_more_micro_batches_per_worker() -> None:
    assert bytes_sent(1000, 2, 2) == (4000, 4000), "one micro-batch for each worker: as much as an all-reduce"
    assert bytes_sent(1000, 4, 9) == (6000, 12000), "three rounds and the putting together"


def test_two_workers_read_the_windows_of_one(alone: dict[tuple[str, str], Path], two_workers: Path) -> None:
    expected = windows_read(alone["lazy", "ordered"], MICRO_BATCHES)
    assert len(expected) == STEPS and len({str(step) for step in expected}) == STEPS
    for name in ("standard-replicate-ordered", "standard-replicate-all_reduce"):
        assert windows_read(two_workers / name, MICRO_BATCHES) == expected, name


def test_ordered_sums_give_two_workers_the_bits_of_one(alone: dict[tuple[str, str], Path], two_workers: Path) -> None:
    """Lazy attention: `test_a_run_goes_on_with_another_number_of_workers`."""
    found = two_workers / "standard-replicate-ordered"
    assert_same_bits(alone["standard", "ordered"], found)
    facts = result_of(found, rank=1)["facts"]
    assert (facts["world_size"], facts["parallel"], facts["reduction"]) == (2, "replicate", "ordered")


def test_an_all_reduce_is_within_rounding_for_standard_attention(
    alone: dict[tuple[str, str], Path], two_workers: Path
) -> None:
    assert largest_difference(alone["standard", "all_reduce"], two_workers / "standard-replicate-all_reduce") <= 1e-5


@pytest.mark.long
def test_sharding_with_an_all_reduce_is_within_rounding_for_standard_attention(
    corpus: Artifact, alone: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    sharded = Run(tmp_path / "sharded", config("standard", parallel="fsdp"))
    train_on(corpus.path.parent, [sharded], 2, tmp_path / "rendezvous")
    assert largest_difference(alone["standard", "all_reduce"], sharded.directory) <= 1e-5


@pytest.mark.parametrize("parallel", ["replicate", "fsdp"])
def test_an_all_reduce_gives_lazy_attention_the_same_first_gradient(
    alone: dict[tuple[str, str], Path], two_workers: Path, parallel: str
) -> None:
    """Relative to its norm. Later steps differ more: the thresholds turn a last bit into another set of zeros."""
    one = torch.load(alone["lazy", "all_reduce"] / "first_gradient-0.pt")
    for rank in (0, 1):
        two = torch.load(two_workers / f"lazy-{parallel}-first" / f"first_gradient-{rank}.pt")
        assert float((one - two).norm() / one.norm()) <= 1e-6


def history_of(directory: Path) -> list[dict[str, Any]]:
    return list(json.loads((directory / "output" / "tables" / "history.json").read_text()))


@pytest.mark.parametrize("name", ["2-1-2", "fsdp-1-fsdp"])
def test_a_run_goes_on_with_another_number_of_workers(
    corpus: Artifact, alone: dict[tuple[str, str], Path], two_workers: Path, tmp_path: Path, name: str
) -> None:
    """Two workers for 11 steps, one for 12, two for the rest: the windows, the curve and the bits of one process."""
    directory = two_workers / name
    parallel = "replicate" if name == "2-1-2" else "fsdp"
    assert "step 11 of 50" in result_of(directory, rank=1)["interrupted"]
    train_here(corpus.path.parent, Run(directory, config("lazy", reduction="ordered"), stop_at=23))
    assert "step 23 of 50" in result_of(directory)["interrupted"]
    last = Run(directory, config("lazy", reduction="ordered", parallel=parallel))
    train_on(corpus.path.parent, [last], 2, tmp_path / "rendezvous")
    facts = result_of(directory)["facts"]
    assert (facts["resumed_from"], facts["world_size"], facts["parallel"]) == (23, 2, parallel)
    expected = windows_read(alone["lazy", "ordered"], MICRO_BATCHES)
    assert windows_read(directory, MICRO_BATCHES, sharded=parallel == "fsdp") == expected
    assert_same_bits(alone["lazy", "ordered"], directory)
    timed = {"tokens_per_s", "step_seconds", "data_wait", "peak_memory_gb"}
    one, found = (
        [{name: row[name] for name in row.keys() - timed} for row in history_of(base)]
        for base in (alone["lazy", "ordered"], directory)
    )
    assert len(one) == STEPS
    assert one == found, "losses, gradient norms, tau and sparsity of every step"


@pytest.mark.long
@pytest.mark.parametrize("activation_checkpointing", ["selective", "block"])
def test_shards_go_with_checkpointed_activations_and_a_chunked_loss(
    corpus: Artifact, tmp_path: Path, activation_checkpointing: str
) -> None:
    """Both call the model's parameters out of turn: blocks once more in the backward pass, the head by chunks."""
    fields = {"reduction": "ordered", "dtype": "bfloat16", "loss_chunk_tokens": 40, "z_loss": 1e-4, "steps": 15}
    one = Run(tmp_path / "one", config("lazy", **fields))
    train_here(corpus.path.parent, one)
    checkpointed = config("lazy", **fields, parallel="fsdp", activation_checkpointing=activation_checkpointing)
    many = Run(tmp_path / "many", checkpointed)
    train_on(corpus.path.parent, [many], 2, tmp_path / "rendezvous")
    assert_same_bits(one.directory, many.directory)


@pytest.mark.parametrize("name", HANDING_ON)
def test_shards_hand_on_values_and_head_masses_as_one_process_does(
    alone: dict[tuple[str, str], Path], two_workers: Path, name: str
) -> None:
    assert_same_bits(alone[name, "ordered"], two_workers / f"{name}-fsdp")
    assert result_of(two_workers / f"{name}-fsdp")["facts"]["parallel"] == "fsdp"
    one, two = (history_of(base) for base in (alone[name, "ordered"], two_workers / f"{name}-fsdp"))
    assert [row.get("sink_balance_loss") for row in one] == [row.get("sink_balance_loss") for row in two]
    assert ("sink_balance_loss" in two[-1]) == name.startswith("sink")


@pytest.mark.long
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("activation_checkpointing", ["none", "block", "selective"])
def test_shards_hand_on_in_checkpointed_bfloat16_blocks_too(
    corpus: Artifact, tmp_path: Path, workers: int, activation_checkpointing: str
) -> None:
    fields = {"dtype": "bfloat16", "loss_chunk_tokens": 40, "activation_checkpointing": activation_checkpointing}
    ones = {name: Run(tmp_path / name, short.model_copy(update=fields)) for name, short in HANDING_ON.items()}
    for run in ones.values():
        train_here(corpus.path.parent, run)
    many = {name: Run(tmp_path / f"{name}-many", sharded(run.config)) for name, run in ones.items()}
    train_on(corpus.path.parent, list(many.values()), workers, tmp_path / "rendezvous")
    for name, run in many.items():
        assert_same_bits(ones[name].directory, run.directory)


@pytest.mark.long
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", ["standard", "lazy"])
@pytest.mark.parametrize("parallel", ["replicate", "fsdp"])
def test_any_number_of_workers_gives_the_bits_of_one(
    corpus: Artifact, tmp_path: Path, parallel: str, mixer: str, dtype: str, workers: int
) -> None:
    """Four workers are more than there are heads, and micro-batches."""
    one = Run(tmp_path / "one", config(mixer, reduction="ordered", dtype=dtype))
    train_here(corpus.path.parent, one)
    many = Run(tmp_path / "many", config(mixer, reduction="ordered", dtype=dtype, parallel=parallel))
    train_on(corpus.path.parent, [many], workers, tmp_path / "rendezvous")
    assert_same_bits(one.directory, many.directory)
    expected = windows_read(one.directory, MICRO_BATCHES)
    assert windows_read(many.directory, MICRO_BATCHES, sharded=parallel == "fsdp") == expected


def test_fsdp_refuses_what_does_not_pass_block_by_block() -> None:
    for mixer in ("random_qk", "text_qk", "gla"):
        with pytest.raises(ValidationError, match=f"mixer={mixer}.*set parallel: replicate"):
            PretrainConfig.model_validate({"model": {"mixer": mixer}, "parallel": "fsdp"})


def test_workers_without_a_micro_batch_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="4 workers share 3 micro-batches a step, so the rest of them is idle"):
        warn_of_settings(config("standard"), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_settings(config("standard"), 3)


def test_one_worker_has_nothing_to_shard(corpus: Artifact, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="parallel=fsdp has nothing to share out with one worker"):
        train_here(corpus.path.parent, Run(tmp_path / "one", config("standard", steps=1, parallel="fsdp")))
    assert result_of(tmp_path / "one")["facts"]["parallel"] == "replicate"


def test_every_parameter_gets_a_gradient_so_that_zeros_may_stand_in_for_an_idle_worker() -> None:
    """A worker without a micro-batch contributes zeros; a parameter without any gradient would start to decay."""
    from lazypipe.model.loss import next_token_loss

    for mixer in ("standard", "lazy"):
        model = Transformer(config(mixer).model, 50)
        next_token_loss(model, torch.arange(34).remainder(50).view(2, 17)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
