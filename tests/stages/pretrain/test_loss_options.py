"""The options of the loss in training: z-loss, and logits in chunks."""

import json
from pathlib import Path

import pytest
import torch

from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Artifact
from lazypipe.stages.data.batches import training_batch
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.pretrain import stage as pretrain
from tests.stages.pretrain.toy_training import context_in, metric_lines, tiny_run, toy_trainer


@pytest.mark.parametrize("chunk", [None, 7])
def test_z_loss_is_in_the_gradient_and_apart_in_the_numbers(
    corpus: Artifact, tmp_path: Path, chunk: int | None
) -> None:
    """Of the first step: gradients in float64 of the definition; then what a run logs."""
    config = tiny_run("standard", z_loss=0.05, loss_chunk_tokens=chunk, steps=1, warmup_steps=0)
    shards = TokenShards(corpus.path / "train")
    model, other = (Transformer(config.model, TokenizeFacts.read(corpus.manifest).vocab_size) for _ in range(2))
    found = toy_trainer(config, model, corpus, context_in(tmp_path)).accumulate_gradients()
    other.double()
    expected = torch.zeros(2, dtype=torch.float64)
    for first in (0, 4):
        windows = torch.from_numpy(training_batch(shards, 32, config.seed, first, 4))
        logits = (other.hidden(windows[:, :-1]) @ other.output_matrix.T).flatten(0, 1)
        log_z = logits.exp().sum(-1).log()
        losses = (log_z - logits[range(128), windows[:, 1:].flatten()]).mean() / 2, (log_z**2).mean() / 2
        (losses[0] + 0.05 * losses[1]).backward()
        expected += torch.stack(losses).detach()
    torch.testing.assert_close(found[[0, 2]].double(), expected, rtol=1e-6, atol=0)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), two.grad, rtol=1e-4, atol=1e-7, msg=name)

    pretrain.run(config, {"tokenize": corpus}, context_in(tmp_path))
    (line,) = metric_lines(context_in(tmp_path))
    assert line["metrics"]["loss"] == pytest.approx(expected[0].item(), rel=1e-5)
    assert line["metrics"]["z_loss"] == pytest.approx(0.05 * expected[1].item(), rel=1e-5)
    (row,) = json.loads((tmp_path / "output" / "tables" / "history.json").read_text())
    assert row["z_loss"] == line["metrics"]["z_loss"]


@pytest.mark.parametrize("masked", [False, True])
def test_a_run_in_chunks_is_the_same_run(corpus: Artifact, tmp_path: Path, masked: bool) -> None:
    """To rounding; without z_loss its numbers have no z_loss."""
    curves = []
    for chunk in (None, 50):
        directory = tmp_path / str(chunk)
        config = tiny_run("lazy", loss_chunk_tokens=chunk, document_masking=masked, steps=6)
        pretrain.run(config, {"tokenize": corpus}, context_in(directory))
        lines = metric_lines(context_in(directory))
        assert all("z_loss" not in line["metrics"] for line in lines)
        curves.append([line["metrics"]["loss"] for line in lines] + [lines[-1]["metrics"]["validation_loss"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
