"""Training learns, repeats itself bit for bit through kills and stops, and shares its work out over workers."""

import json
import math
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from lazypipe.model import transformer
from lazypipe.model.activation_checkpointing import checkpointed
from lazypipe.model.checkpoint import load_checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.model.loss import next_token_loss
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Artifact, Context, Interrupted, Outputs, UserError
from lazypipe.stages.data.batches import training_batch, validation_windows
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.pretrain.trainer import Trainer
from tests.stages.pretrain.toy_training import context_in, metric_lines, start_process, tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")

TIMINGS = {"tokens_per_s", "step_seconds", "data_wait", "peak_memory_gb"}
MIXERS = ("standard", "lazy")  # with thresholds and without; tests/stages/pretrain/test_mechanisms.py trains them all


@pytest.fixture(scope="module")
def undisturbed(corpus: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of a 12-step run of each mixer, with one thread, as every run in this file."""
    directories = {}
    for mixer in MIXERS:
        directories[mixer] = tmp_path_factory.mktemp(mixer)
        train(tiny_run(mixer), corpus, directories[mixer])
    return directories


def train(config: PretrainConfig, corpus: Artifact, directory: Path) -> Outputs:
    return pretrain.run(config, {"tokenize": corpus}, context_in(directory))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "output" / "checkpoint" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_learns_and_says_what_it_did(corpus: Artifact, tmp_path: Path, mixer: str) -> None:
    config = tiny_run(mixer, steps=60, log_every=5, validate_every=25)
    outputs = train(config, corpus, tmp_path)
    assert outputs.metrics["validation_loss"] < corpus.metrics["unigram_entropy"] - 1.0
    assert outputs.metrics["tokens_per_s"] == pytest.approx(60 * 256 / outputs.metrics["train_seconds"])
    facts = outputs.facts
    assert (facts.steps, facts.steps_executed, facts.resumed_from, facts.nonfinite_steps) == (60, 60, 0, 0)
    assert (facts.tokens, facts.seq_len, facts.world_size, facts.threads) == (60 * 256, 32, 1, 1)

    logged = metric_lines(context_in(tmp_path))
    assert [line["step"] for line in logged] == [*range(5, 61, 5)]
    assert [line["step"] for line in logged if "validation_loss" in line["metrics"]] == [25, 50, 60]
    last = logged[-1]["metrics"]
    assert last["lr"] == pytest.approx(config.lr * config.min_lr_fraction)
    lazy_names = {f"{name}/layer_{layer}" for name in ("tau", "sparsity") for layer in (0, 1)}
    assert lazy_names & last.keys() == (lazy_names if mixer == "lazy" else set())
    rows = pq.read_table(tmp_path / "output" / "tables" / "history.parquet").to_pylist()
    assert [row["step"] for row in rows] == [line["step"] for line in logged]
    assert [row["loss"] for row in rows] == [line["metrics"]["loss"] for line in logged]
    progress = json.loads((tmp_path / "scratch" / "progress.json").read_text())
    assert (progress["done"], progress["total"], progress["unit"]) == (60, 60, "steps")

    checkpoint = load_checkpoint(tmp_path / "output" / "checkpoint")
    tokenization = TokenizeFacts.read(corpus.manifest)
    assert (checkpoint.vocab_size, checkpoint.eos_id) == (tokenization.vocab_size, tokenization.eos_id)
    assert checkpoint.tokenizer_path.read_bytes() == (corpus.path / "tokenizer" / "tokenizer.json").read_bytes()
    shards = TokenShards(corpus.path / "validation")
    windows = np.stack([shards.read(32 * int(w), 33) for w in validation_windows(shards, 32, 8)])
    with torch.no_grad():
        assert next_token_loss(checkpoint.model, torch.from_numpy(windows)).item() == pytest.approx(
            outputs.metrics["validation_loss"], rel=1e-5
        )
    if mixer == "lazy":
        sparsity = [last[f"sparsity/layer_{layer}"] for layer in (0, 1)]
        found = checkpoint.model.statistics_by_layer(torch.from_numpy(windows[:2, :-1]))
        assert sparsity == pytest.approx([share for share, _ in found])
        assert rows[-1]["sparsity"] == pytest.approx(sum(sparsity) / 2)
        for layer in checkpoint.model.layers:
            assert (layer.mixer.tau + 1).abs().max() > 1e-3
            assert layer.mixer.bias.abs().max() > 1e-2


def test_a_step_is_the_mean_gradient_of_its_windows_clipped(corpus: Artifact, tmp_path: Path) -> None:
    """The first logged loss and gradient norm against one float64 pass over all windows of the step."""
    config = tiny_run("standard", steps=1, warmup_steps=0, grad_clip=0.01)
    train(config, corpus, tmp_path)
    logged = metric_lines(context_in(tmp_path))[0]["metrics"]
    vocab_size = TokenizeFacts.read(corpus.manifest).vocab_size
    model = Transformer(config.model, vocab_size, config.seed).double()
    windows = torch.from_numpy(training_batch(TokenShards(corpus.path / "train"), 32, config.seed, 0, 8))
    loss = next_token_loss(model, windows)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-4)
    # Adam's first step is lr * sign(gradient) wherever the clipped gradient is far above eps, plus the decay.
    before = Transformer(config.model, vocab_size, config.seed).layers[0].mixer.v_proj.weight
    moved = weights(tmp_path)["layers.0.mixer.v_proj.weight"] - before * (1 - config.lr * config.weight_decay)
    gradient = model.layers[0].mixer.v_proj.weight.grad * (config.grad_clip / norm)
    torch.testing.assert_close(moved, (-config.lr * gradient / (gradient.abs() + 1e-8)).float(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_killed_run_resumes_to_the_same_bits(
    corpus: Artifact, undisturbed: dict[str, Path], tmp_path: Path, mixer: str
) -> None:
    config = tiny_run(mixer)
    victim = start_process(corpus.path.parent, tmp_path, config, 8)  # checkpoint at step 5, killed at 8
    victim.join(120)
    assert victim.exitcode == -signal.SIGKILL
    assert not (tmp_path / "output" / "checkpoint").exists()
    with (tmp_path / "output" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "ti')  # a line torn by the crash
    outputs = train(config, corpus, tmp_path)
    assert (outputs.facts.resumed_from, outputs.facts.steps_executed) == (5, 7)
    assert_same_weights(undisturbed[mixer], tmp_path)
    assert [line["step"] for line in metric_lines(context_in(tmp_path))] == [*range(1, 13)]
    expected = json.loads((undisturbed[mixer] / "output" / "tables" / "history.json").read_text())
    found = json.loads((tmp_path / "output" / "tables" / "history.json").read_text())
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        assert {k: v for k, v in a.items() if k not in TIMINGS} == {k: v for k, v in b.items() if k not in TIMINGS}


def test_a_stop_saves_and_the_next_run_goes_on(corpus: Artifact, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    context = context_in(tmp_path)
    stop = context.scratch_dir / "stop"
    stop.touch()
    with pytest.raises(Interrupted, match="step 1 of 12"):
        pretrain.run(tiny_run("standard"), {"tokenize": corpus}, context)
    stop.unlink()
    outputs = pretrain.run(tiny_run("standard"), {"tokenize": corpus}, context)
    assert (outputs.facts.resumed_from, outputs.facts.steps_executed) == (1, 11)
    assert_same_weights(undisturbed["standard"], tmp_path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    corpus: Artifact, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    class StopAt11(Context):
        stop_requested = property(lambda self: (self.scratch_dir / "checkpoints" / "step-00000010").exists())

    plain = context_in(tmp_path)
    with pytest.raises(Interrupted, match="step 11 of 12"):
        config = tiny_run("standard", async_checkpoints=False)
        pretrain.run(config, {"tokenize": corpus}, StopAt11(plain.output_dir, plain.scratch_dir))
    newest = plain.scratch_dir / "checkpoints" / "step-00000011" / "__0_0.distcp"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step-00000011 is damaged \(.*__0_0.distcp does not match"):
        outputs = train(tiny_run("standard"), corpus, tmp_path)
    assert outputs.facts.resumed_from == 10
    assert_same_weights(undisturbed["standard"], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lr": 0.5}, r"lr=0\.01, this run has lr=0\.5"), ({"mixer": "lazy"}, r"model\.mixer=standard, .*mixer=lazy")],
)
def test_a_checkpoint_of_another_config_is_refused(
    corpus: Artifact, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    context = context_in(tmp_path)
    (context.scratch_dir / "stop").touch()
    with pytest.raises(Interrupted):
        pretrain.run(tiny_run("standard"), {"tokenize": corpus}, context)
    (context.scratch_dir / "stop").unlink()
    config = tiny_run(**{"mixer": "standard", **change})
    with pytest.raises(UserError, match=message):
        pretrain.run(config, {"tokenize": corpus}, context)
    # How often it logs or validates is no part of what a run is.
    outputs = pretrain.run(tiny_run("standard", log_every=4, validate_every=3), {"tokenize": corpus}, context)
    assert outputs.facts.resumed_from == 1


@pytest.mark.parametrize("mode", ["block", "selective"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_run_with_checkpointed_blocks_ends_with_the_same_bits(
    corpus: Artifact,
    undisturbed: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mixer: str,
    mode: str,
) -> None:
    asked = []
    honest = checkpointed
    monkeypatch.setattr(transformer, "checkpointed", lambda *args: asked.append(args[-1]) or honest(*args))
    train(tiny_run(mixer, activation_checkpointing=mode), corpus, tmp_path)
    assert asked == [mode == "selective"] * (12 * 2 * 2)  # steps, micro-batches, layers; none in validation
    assert_same_weights(tmp_path, undisturbed[mixer])


def test_workers_share_the_micro_batches(corpus: Artifact, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    """2 micro-batches a step for three workers: the third contributes zeros. More in test_workers.py."""
    world_size, rendezvous = 3, tmp_path / "rendezvous"
    workers = [
        start_process(corpus.path.parent, tmp_path, tiny_run("standard"), 0, rank, world_size, rendezvous)
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * world_size
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(world_size)]
    assert all(found["facts"]["world_size"] == world_size for found in results)
    assert len({found["metrics"]["validation_loss"] for found in results}) == 1
    alone = weights(undisturbed["standard"])
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, alone[name], atol=1e-5, rtol=0)
    assert [line["step"] for line in metric_lines(context_in(tmp_path))] == [*range(1, 13)]


def test_workers_without_a_process_group_are_refused(corpus: Artifact, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        pretrain.run(tiny_run("standard"), {"tokenize": corpus}, context_in(tmp_path, rank=0, world_size=2))


def test_a_non_finite_step_is_skipped_and_counted(corpus: Artifact, tmp_path: Path) -> None:
    """Step 4's gradients are poisoned: as if it had not been, but for the learning rate that moved on."""
    weights_seen = {}

    class Poisoned(Trainer):
        def accumulate_gradients(self) -> torch.Tensor:
            weights_seen[self.state.step] = self.model.embedding.weight.detach().clone()
            losses = super().accumulate_gradients()
            if self.state.step == 3:
                self.model.final_norm.weight.grad[0] = math.inf
            return losses

    with pytest.warns(UserWarning, match="step 4: skipped"):
        outputs = pretrain.run(tiny_run("standard"), {"tokenize": corpus}, context_in(tmp_path), Poisoned)
    assert outputs.facts.nonfinite_steps == 1
    assert torch.equal(weights_seen[3], weights_seen[4])
    assert not torch.equal(weights_seen[4], weights_seen[5])
    fourth = json.loads((tmp_path / "output" / "tables" / "history.json").read_text())[3]
    assert fourth["grad_norm"] is None
    assert fourth["loss"] is not None


@pytest.mark.filterwarnings("ignore:step [1-9]. skipped")
def test_divergence_stops_with_the_reason(corpus: Artifact, tmp_path: Path) -> None:
    class Poisoned(Trainer):
        def backward(self, micro_batch: int, weight: float = 1.0) -> torch.Tensor:
            return super().backward(micro_batch, weight) * math.nan

    with (
        pytest.warns(UserWarning, match="step 10: skipped"),
        pytest.raises(RuntimeError, match=r"not finite in 10 steps in a row.*step 10.*lower lr"),
    ):
        pretrain.run(tiny_run("standard"), {"tokenize": corpus}, context_in(tmp_path), Poisoned)


def test_a_warm_up_longer_than_the_run_is_allowed_and_said(corpus: Artifact, tmp_path: Path) -> None:
    filters = list(warnings.filters)
    with pytest.warns(UserWarning, match="warmup_steps=8 is not below steps=2"):
        train(tiny_run("standard", steps=2, warmup_steps=8), corpus, tmp_path)
        within = list(warnings.filters)
    assert list(warnings.filters) == filters, "what training silences is heard again afterwards"
    assert not any(message and "torch.distributed" in message.pattern for _, message, *_ in within)
    rates = [line["metrics"]["lr"] for line in metric_lines(context_in(tmp_path))]
    assert rates == pytest.approx([0.01 / 8, 0.01 / 4])


def test_a_corpus_without_a_window_is_refused_before_compute(corpus: Artifact, tmp_path: Path) -> None:
    length = 10**6
    model = {**tiny_run("standard").model.model_dump(), "max_seq_len": length}
    config = tiny_run("standard").model_copy(
        update={"model": type(tiny_run("standard").model)(**model), "seq_len": length, "tokens_per_step": 4 * length}
    )
    with pytest.raises(UserError, match=rf"seq_len={length} needs {length + 1}"):
        train(config, corpus, tmp_path)
    assert not any((tmp_path / "scratch").iterdir())


def test_bfloat16_learns_and_keeps_its_parameters_float32(corpus: Artifact, tmp_path: Path) -> None:
    outputs = train(tiny_run("lazy", dtype="bfloat16", steps=30), corpus, tmp_path)
    assert outputs.metrics["validation_loss"] < corpus.metrics["unigram_entropy"] - 0.3
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}


def test_training_leaves_the_global_random_state_alone(corpus: Artifact, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(tiny_run("lazy", steps=1, warmup_steps=0), corpus, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("mixer", "kernel", "device", "checked"),
    [
        ("lazy", "auto", "cuda", True),
        ("lazy", "triton", "cuda", True),
        ("lazy", "reference", "cuda", False),
        ("standard", "auto", "cuda", False),
        ("lazy", "auto", "cpu", False),
    ],
)
def test_the_triton_kernels_are_checked_before_they_train(
    monkeypatch: pytest.MonkeyPatch, mixer: str, kernel: str, device: str, checked: bool
) -> None:
    from lazypipe.kernels.gpu import preflight
    from lazypipe.stages.pretrain.checks import check_kernels

    asked: list[tuple[object, ...]] = []

    def record(*shape: object, device: torch.device) -> preflight.Preflight:
        asked.append((*shape, device.type))
        return preflight.Preflight({"out": 1e-6}, 2e-4, "a GPU")

    monkeypatch.setattr(preflight, "preflight", record)
    model = ModelConfig(hidden_size=64, num_heads=4, num_kv_heads=2, mixer=mixer, max_bias_length=32)
    result = check_kernels(model, kernel, "bfloat16", torch.device(device))
    assert asked == ([(4, 2, 16, 32, torch.bfloat16, "cuda")] if checked else [])
    assert (result is not None) == checked
