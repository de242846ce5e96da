"""The head-balance loss of `sink` against its definition, in training and nowhere else."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lazypipe.model import loss as model_loss
from lazypipe.model.checkpoint import load_checkpoint
from lazypipe.model.loss import head_balance, next_token_loss, next_token_losses
from lazypipe.model.mixers.base import BlockInputs
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Artifact
from lazypipe.stages.data.batches import training_batch
from lazypipe.stages.data.shards import TokenShards
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.config import PretrainConfig
from tests.model.tiny_model import awake, some_tokens, tiny
from tests.stages.pretrain.toy_training import context_in, metric_lines, tiny_run, toy_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [1, 9, 4, 9]


def importance(mixer: Any, x: Tensor, inputs: BlockInputs, lengths: list[int]) -> Tensor:
    """Imp [H] float64 of the normed layer input x [B, L, hidden], one query and one head at a time."""
    q, k = (one.double() for one in mixer.queries_and_keys(x, inputs))
    totals: list[Any] = []
    for head in range(4):
        gates = []
        for row in range(x.shape[0]):
            begin = 0
            for length in lengths:
                for t in range(begin, begin + length):
                    scores = [q[row, head, t] @ k[row, head // 2, j] / 8**0.5 for j in range(begin, t + 1)]
                    lse = torch.stack(scores).logsumexp(0)
                    gates.append(torch.sigmoid(lse - mixer.sink[head].double()))
                begin += length
        totals.append(sum(gates) / len(gates))
    return torch.stack(totals)


def coefficient_of_variation_squared(values: Tensor) -> Tensor:
    mean = values.sum() / len(values)
    return ((values - mean) ** 2).sum() / len(values) / mean**2


@pytest.mark.parametrize("packed", [False, True])
def test_value_and_gradient_are_the_definition(packed: bool) -> None:
    model = awake(tiny("sink", num_layers=3, num_kv_heads=2, pattern=[2]))
    tokens = some_tokens(1 if packed else 2, sum(LENGTHS))
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int() if packed else None
    hidden, mass = model.hidden_and_head_mass(tokens, borders)
    assert len(mass) == 2 and all(one.shape == (4,) and one.dtype == torch.float32 for one in mass)
    found = head_balance(mass)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(tokens, cu_seqlens=borders), hidden, rtol=1e-5, atol=1e-5)

    x, inputs, _ = model.enter(tokens, cu_seqlens=borders)
    expected = torch.zeros((), dtype=torch.float64)
    for layer in model.layers:
        h, _ = layer.mixer_inputs(x, inputs)
        if layer.index != 1:
            expected = expected + 4 * coefficient_of_variation_squared(
                importance(layer.mixer, h, inputs, LENGTHS if packed else [sum(LENGTHS)])
            )
        x = layer(x, inputs).x
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    learned = list(model.parameters())
    wanted, given = (torch.autograd.grad(one, learned, materialize_grads=True) for one in (expected, found))
    assert sum(bool(one.any()) for one in wanted) > 20
    for name, one, two in zip(dict(model.named_parameters()), given, wanted, strict=True):
        assert (one - two).norm() <= 1e-4 * two.norm() + 1e-7, name


def test_equal_heads_are_balanced_and_one_open_head_is_not() -> None:
    assert head_balance([torch.full((4,), 0.3)]).item() == pytest.approx(0, abs=1e-12)
    # One of four heads has all the mass: CV^2 = 3, times 4 heads.
    assert head_balance([torch.tensor([1.0, 0, 0, 0]), torch.full((4,), 0.5)]).item() == pytest.approx(12)


def test_it_keeps_no_matrix_for_the_backward_pass_that_the_attention_would_not() -> None:
    model, largest = awake(tiny("sink", num_layers=1)), {}
    for asked in (False, True):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            (model.hidden_and_head_mass if asked else model.hidden)(some_tokens(1, 512))
        largest[asked] = max(sizes)
    assert largest[True] == largest[False] < 4 * 512 * 512


def test_training_adds_it_and_logs_it_apart(corpus: Artifact, tmp_path: Path) -> None:
    """One step: the gradient is that of cross-entropy + lambda L; the losses that are reported are without it."""
    config = tiny_run("sink", steps=16, validate_every=16, sink_balance=3.0)
    shards = TokenShards(corpus.path / "train")
    model, other = (Transformer(config.model, TokenizeFacts.read(corpus.manifest).vocab_size) for _ in range(2))
    losses = toy_trainer(config, model, corpus, context_in(tmp_path)).accumulate_gradients()
    expected = [0.0, 0.0, 0.0]
    for first in (0, 4):
        windows = torch.from_numpy(training_batch(shards, 32, config.seed, first, 4))
        losses_here = next_token_losses(other, windows, with_head_balance=True)
        loss, balance = losses_here.objective / 2, losses_here.head_balance / 2
        (loss + 3.0 * balance).backward()
        expected = [expected[0] + loss.item(), expected[1] + balance.item(), 0.0]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6) and expected[1] > 0
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)

    final = {}
    for weight in (0.0, 3.0):
        run = PretrainConfig.model_validate({**config.model_dump(), "sink_balance": weight})
        directory = tmp_path / f"run-{weight}"
        pretrain.run(run, {"tokenize": corpus}, context_in(directory))
        lines = metric_lines(context_in(directory))
        assert all(("sink_balance_loss" in line["metrics"]) == (weight > 0) for line in lines)
        history = json.loads((directory / "output" / "tables" / "history.json").read_text())
        assert ("sink_balance_loss" in history[-1]) == (weight > 0)
        trained = load_checkpoint(directory / "output" / "checkpoint").model
        with torch.no_grad():
            scored = next_token_losses(trained, windows, with_head_balance=True)
            assert scored.objective.item() == next_token_loss(trained, windows).item()
            final[weight] = scored.head_balance.item()
        if weight:
            first = lines[0]["metrics"]
            assert first["loss"] == pytest.approx(expected[0], rel=1e-5)
            assert first["sink_balance_loss"] == pytest.approx(3.0 * expected[1], rel=1e-4)
    assert final[3.0] < 0.8 * final[0.0]


def test_without_it_nothing_is_asked_for(corpus: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("computed")

    monkeypatch.setattr(model_loss, "head_balance", never)
    pretrain.run(tiny_run("sink", steps=1, warmup_steps=0), {"tokenize": corpus}, context_in(tmp_path / "sink"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = tiny_run("softmax1", steps=1, warmup_steps=0, sink_balance=0.01)
        pretrain.run(run, {"tokenize": corpus}, context_in(tmp_path / "softmax1"))
    assert any("sink_balance=0.01 balances learned sink logits" in str(one.message) for one in caught)
