"""The numbers logged while training, against numbers worked out in another way."""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lazypipe.model.config import ModelConfig
from lazypipe.stages.contract import Artifact
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.hardware import PEAKS, Machine, machine_of, matrix_precision, peak_flops, peak_memory_gb
from lazypipe.stages.sparsity.metrics import measure_windows
from tests.model.tiny_model import sparsity_by_layer
from tests.stages.pretrain.toy_training import context_in, metric_lines, tiny_run, toy_corpus
from tests.stages.tiny_experiment import VOCAB_SIZE, trained_looking


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return toy_corpus(tmp_path_factory.mktemp("corpus"), documents=12)


@pytest.mark.parametrize(
    ("name", "bfloat16", "tf32"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 156),
        ("A100-SXM4-80GB", 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 156),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H100 NVL", 835.5, 417.5),
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA GH200 144G HBM3e", 989.4, 494.7),
        ("NVIDIA B200", 2250, 1125),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA A10G", None, None),
        ("Tesla V100-SXM2-16GB", None, None),
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_model_and_no_other(
    name: str, bfloat16: float | None, tf32: float | None
) -> None:
    assert peak_flops(name, "bfloat16") == (None if bfloat16 is None else pytest.approx(bfloat16 * 1e12))
    assert peak_flops(name, "tf32") == (None if tf32 is None else pytest.approx(tf32 * 1e12))


def test_every_peak_names_its_source_and_orders_the_precisions() -> None:
    for pattern, peak in PEAKS:
        assert peak.bfloat16 > peak.tf32 >= peak.float32 or "L40" in pattern, pattern
        assert 1.9 < peak.bfloat16 / peak.tf32 < 2.1, pattern
        assert peak.source


def machine_here(model: ModelConfig, vocab_size: int, workers: int) -> Machine:
    shape: dict[str, Any] = {"seq_len": 128, "micro_batch_size": 8, "dtype": "bfloat16"}
    return machine_of(model, vocab_size, **shape, device=torch.device("cpu"), workers=workers)


def test_utilisation_by_hand() -> None:
    """6 N per token and 12 T d per layer of attention, forward and backward; two workers have two peaks."""
    model = ModelConfig(hidden_size=64, num_layers=3, num_heads=4, max_seq_len=128, tie_embeddings=True)
    here = machine_here(model, vocab_size=1000, workers=2)
    assert here.utilisation(1e6) is None and here.peak_flops is None
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * model.mlp_size) + 1000 * 64
    expected = 6 * matrices + 3 * 12 * 128 * 64
    assert here.flops_per_token == expected
    on_gpus = Machine("NVIDIA H100 80GB HBM3", 2, expected, peak_flops("NVIDIA H100 80GB HBM3", "bfloat16"))
    assert on_gpus.utilisation(1e6) == pytest.approx(expected * 1e6 / (2 * 989.4e12))


def test_float32_counts_against_what_multiplies_it() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        found = []
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            found += [matrix_precision("float32"), matrix_precision("bfloat16")]
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == ["float32", "bfloat16", "tf32", "bfloat16"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel keeps no peak to set back")
def test_peak_memory_is_that_of_the_run_and_not_of_what_came_before() -> None:
    cpu = torch.device("cpu")
    block = np.ones(40_000_000)  # 0.32 GB
    with_block = peak_memory_gb(cpu)
    del block
    assert peak_memory_gb(cpu) > with_block - 0.01  # the kernel's counter lags by some pages
    machine_here(ModelConfig(), vocab_size=100, workers=1)
    assert peak_memory_gb(cpu) < with_block - 0.25
    again = np.ones(40_000_000)
    assert peak_memory_gb(cpu) > with_block - 0.05
    del again


def test_a_step_says_how_long_it_took_and_what_of_it_was_waiting(
    corpus: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading slowed down to 10 ms a window: 8 windows a step, 80 ms of each step and nothing of validation."""
    config = tiny_run("standard", steps=4)
    pretrain.run(config, {"tokenize": corpus}, context_in(tmp_path / "fast"))
    honest = TokenShards.read

    def slow(self: TokenShards, start: int, length: int) -> Any:
        time.sleep(0.01)
        return honest(self, start, length)

    monkeypatch.setattr(TokenShards, "read", slow)
    outputs = pretrain.run(config, {"tokenize": corpus}, context_in(tmp_path / "slow"))
    fast, slowed = (metric_lines(context_in(tmp_path / name)) for name in ("fast", "slow"))
    for quick, line in zip(fast, slowed, strict=True):
        numbers = line["metrics"]
        assert numbers["tokens_per_s"] == pytest.approx(256 / numbers["step_seconds"])
        assert 0.08 <= numbers["data_wait"] * numbers["step_seconds"] < 0.2
        assert quick["metrics"]["data_wait"] < 0.3
        assert 0.05 < numbers["peak_memory_gb"] < 100
        assert "mfu" not in numbers
    waits = [line["metrics"]["data_wait"] * line["metrics"]["step_seconds"] for line in slowed]
    assert outputs.metrics["data_wait"] * outputs.metrics["train_seconds"] == pytest.approx(sum(waits))
    assert outputs.facts.peak_flops == "unknown" and outputs.facts.gpu == "none"


MECHANISMS = ("standard", "lazy", "sink", "random_qk", "stick_breaking")


@pytest.mark.parametrize("mixer", MECHANISMS)
@pytest.mark.parametrize("heads", [{}, {"num_kv_heads": 2}])
def test_the_sink_of_a_layer_is_the_mean_of_its_first_column(mixer: str, heads: dict[str, int]) -> None:
    model = trained_looking(mixer, **heads)
    tokens = torch.randint(VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(1))
    expected = measure_windows(model.attention_rows(tokens, 16))
    found = model.statistics_by_layer(tokens)
    assert [sink for _, sink in found] == pytest.approx(expected["sink"].mean((1, 2)).tolist(), rel=1e-4, abs=1e-7)
    if mixer == "lazy":
        shares = expected["sparsity"].mean((1, 2)).tolist()
        assert [share for share, _ in found] == pytest.approx(shares, abs=2e-4)
        assert [share for share, _ in found] == pytest.approx(sparsity_by_layer(model, tokens))


@pytest.mark.parametrize("mixer", MECHANISMS)
def test_in_packed_documents_the_first_key_is_that_of_the_document(mixer: str) -> None:
    """The mean over all queries is that of the documents one by one, weighted by their lengths."""
    model = trained_looking(mixer)
    tokens = torch.randint(VOCAB_SIZE, (1, 60), generator=torch.Generator().manual_seed(2))
    borders = [0, 7, 8, 29, 60]
    packed = [sink for _, sink in model.statistics_by_layer(tokens, torch.tensor(borders, dtype=torch.int32))]
    alone = np.zeros(2)
    for start, end in itertools.pairwise(borders):
        alone += [(end - start) * sink / 60 for _, sink in model.statistics_by_layer(tokens[:, start:end])]
    assert packed == pytest.approx(alone.tolist(), rel=1e-4, abs=1e-7)


def test_layers_without_attention_have_no_sink(corpus: Artifact, tmp_path: Path) -> None:
    config = tiny_run("mlp", steps=2, warmup_steps=0)
    config = config.model_copy(update={"model": config.model.model_copy(update={"pattern": "even"})})
    pretrain.run(config, {"tokenize": corpus}, context_in(tmp_path))
    last = metric_lines(context_in(tmp_path))[-1]["metrics"]
    assert {name for name in last if name.startswith(("sink/", "sparsity/"))} == {"sink/layer_1"}
    assert 0 < last["sink/layer_1"] < 1
