"""Pretraining within documents: the gradients of the documents one by one, resumed to the same bits, scored alike."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lazypipe.model.checkpoint import load_checkpoint
from lazypipe.model.loss import next_token_loss
from lazypipe.model.mixers.registry import MIXERS
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Artifact
from lazypipe.stages.data.batches import document_borders, read_window, training_batch, validation_windows
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.evaluate import stage as evaluate
from lazypipe.stages.evaluate.config import EvaluateConfig, ExtrapolationConfig
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.config import PretrainConfig
from tests.model.tiny_model import with_side_text
from tests.stages.pretrain.test_mechanisms import learns_and_resumes
from tests.stages.pretrain.toy_training import context_in, metric_lines, tiny_run, toy_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST_SAMPLE = 8  # of the second step
BRIEF = {"standard", "lazy", "gating", "text_qk", "elliptical"}  # each takes the documents apart in its own way


def short_documents(corpus: Artifact) -> Artifact:
    """The corpus with its most frequent token as the end-of-document token: documents of a few tokens."""
    stop = int(np.bincount(TokenShards(corpus.path / "train").read(0, 2000)).argmax())
    return Artifact(corpus.path, {"facts": {**corpus.manifest["facts"], "eos_id": stop}, "metrics": corpus.metrics})


def masked_run(mixer: str, pattern: object = "uniform", **fields: object) -> PretrainConfig:
    config = tiny_run(mixer, steps=16, checkpoint_every=6, validate_every=16, document_masking=True)
    model = {**config.model.model_dump(), "pattern": pattern}
    return PretrainConfig.model_validate({**config.model_dump(), "model": model, **fields})


def documents_of(windows: np.ndarray, eos_id: int) -> list[torch.Tensor]:
    """By hand: the stretches [n + 1] of each window whose n predictions belong to one document."""
    stretches = []
    for window in windows:
        begin = 0
        for position, token in enumerate(window[:-1]):
            if token == eos_id or position == len(window) - 2:
                stretches.append(torch.from_numpy(window[begin : position + 2]))
                begin = position + 1
    return stretches


def test_documents_end_with_their_eos_or_with_the_window() -> None:
    windows = np.array([[5, 0, 7, 8, 0], [0, 0, 3, 0, 4], [1, 2, 3, 4, 0]])
    borders = document_borders(windows, eos_id=0)
    assert borders.dtype == np.int32
    assert borders.tolist() == [0, 2, 4, 5, 6, 8, 12]  # a last target 0 ends nothing: it is no input here
    assert windows[0, -1] == 0 and windows[2, -1] == 0  # the windows are as they were
    assert document_borders(windows, eos_id=9).tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize("mixer", [*MIXERS])
def test_gradients_are_those_of_a_loop_over_documents(corpus: Artifact, tmp_path: Path, mixer: str) -> None:
    short = short_documents(corpus)
    config, eos_id = masked_run(mixer, "even"), TokenizeFacts.read(short.manifest).eos_id
    shards = TokenShards(corpus.path / "train")
    vocab_size = TokenizeFacts.read(corpus.manifest).vocab_size
    model, other = (with_side_text(Transformer(config.model, vocab_size)) for _ in range(2))
    context = context_in(tmp_path)
    loss, *_ = toy_trainer(config, model, corpus, context, 1, eos_id=eos_id).accumulate_gradients()
    windows = training_batch(shards, config.seq_len, config.seed, FIRST_SAMPLE, 8)
    stretches = documents_of(windows, eos_id)
    assert len(stretches) > 16 and min(len(one) for one in stretches) == 2
    expected = sum(next_token_loss(other, one[None], "sum") for one in stretches) / (8 * config.seq_len)
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None, name
        # A weight at Lazy's threshold may fall on either side of it by another order of summation.
        assert (one.grad - two.grad).norm() <= (1e-2 if mixer == "lazy" else 1e-4) * two.grad.norm(), name
    if mixer != "mlp":
        crossing, *_ = toy_trainer(config, other, corpus, context, 1).accumulate_gradients()
        assert crossing.item() != pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("pattern", ["uniform", pytest.param("even", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "mixer", [pytest.param(name, marks=() if name in BRIEF else pytest.mark.long) for name in MIXERS]
)
def test_every_mechanism_learns_and_resumes_within_documents(
    corpus: Artifact, tmp_path: Path, mixer: str, pattern: str
) -> None:
    learns_and_resumes(masked_run(mixer, pattern), short_documents(corpus), tmp_path)


def test_validation_and_evaluation_are_masked_like_training(corpus: Artifact, tmp_path: Path) -> None:
    short = short_documents(corpus)
    config, eos_id = masked_run("lazy"), TokenizeFacts.read(short.manifest).eos_id
    outputs = pretrain.run(config, {"tokenize": short}, context_in(tmp_path / "masked"))
    assert outputs.facts.document_masking is True
    directory = tmp_path / "masked" / "output"
    model = load_checkpoint(directory / "checkpoint").model
    shards = TokenShards(corpus.path / "validation")
    windows = np.stack([read_window(shards, 32, w) for w in validation_windows(shards, 32, 8)])
    stretches = documents_of(windows, eos_id)
    with torch.no_grad():
        expected = sum(next_token_loss(model, one[None], "sum").item() for one in stretches) / (8 * 32)
        crossing = next_token_loss(model, torch.from_numpy(windows)).item()
    assert outputs.metrics["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert crossing != pytest.approx(expected, rel=5e-5)
    found = model.statistics_by_layer(
        torch.from_numpy(windows[:2, :-1]).reshape(1, -1), torch.from_numpy(document_borders(windows[:2], eos_id))
    )
    logged = metric_lines(context_in(tmp_path / "masked"))[-1]["metrics"]
    assert [logged[f"sparsity/layer_{layer}"] for layer in (0, 1)] == pytest.approx([share for share, _ in found])

    scoring = EvaluateConfig(
        extrapolation=ExtrapolationConfig(context_lengths=(16, 32)), prompts=("the",), max_new_tokens=2, max_tokens=400
    )
    losses = {}
    for masked in (True, False):
        trained = Artifact(directory, {"facts": {**outputs.facts.to_json(), "document_masking": masked}, "metrics": {}})
        inputs = {"tokenize": short, "pretrain": trained}
        evaluate.run(scoring, inputs, context_in(tmp_path / f"evaluate-{masked}"))
        table = tmp_path / f"evaluate-{masked}" / "output" / "tables" / "context_lengths.json"
        losses[masked] = {row["context_length"]: row["loss"] for row in json.loads(table.read_text())}
    for length, loss in losses[True].items():
        chosen = validation_windows(shards, length, 400 // length)
        stretches = documents_of(np.stack([read_window(shards, length, w) for w in chosen]), eos_id)
        with torch.no_grad():
            nats = sum(next_token_loss(model, one[None], "sum").item() for one in stretches)
        assert loss == pytest.approx(nats / (length * len(chosen)), rel=1e-5)
        assert loss != pytest.approx(losses[False][length], rel=5e-5)

    longer = scoring.model_copy(update={"extrapolation": ExtrapolationConfig(context_lengths=(32,), same_tokens=64)})
    trained = Artifact(directory, {"facts": outputs.facts.to_json(), "metrics": {}})
    with pytest.warns(UserWarning, match="document_masking, but extrapolation over the same tokens"):
        evaluate.run(longer, {"tokenize": short, "pretrain": trained}, context_in(tmp_path / "longer"))


def test_without_borders_in_the_windows_masking_changes_rounding_only(corpus: Artifact, tmp_path: Path) -> None:
    nowhere = Artifact(corpus.path, {"facts": {**corpus.manifest["facts"], "eos_id": -1}, "metrics": corpus.metrics})
    config = masked_run("standard", steps=4)
    found = pretrain.run(config, {"tokenize": nowhere}, context_in(tmp_path / "masked"))
    plain = config.model_copy(update={"document_masking": False})
    expected = pretrain.run(plain, {"tokenize": corpus}, context_in(tmp_path / "plain"))
    assert expected.facts.document_masking is False
    assert found.metrics["validation_loss"] == pytest.approx(expected.metrics["validation_loss"], rel=1e-5)
