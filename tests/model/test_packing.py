"""Packed documents: one row of several is the documents one by one, for every mechanism, gradients included."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lazypipe.model.mixers import query_blocks
from lazypipe.model.mixers.registry import MIXERS
from lazypipe.model.packing import Documents
from lazypipe.model.transformer import Transformer
from tests.model.mixers.test_lazy_ablations import ABLATIONS
from tests.model.tiny_model import VOCAB, awake, some_tokens, sparsity_by_layer, tiny

# A document of one token at each end and between, two of a length, one beyond W = 8 and the windows of swa.
LENGTHS = [1, 5, 17, 1, 1, 9, 5, 1]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
TOTAL = sum(LENGTHS)
CASES: dict[str, dict[str, Any]] = {
    **{name: {"mixer": name} for name in MIXERS},
    "swa": {"mixer": "swa", "swa_window": 4},
    "streaming": {"mixer": "swa", "swa_window": 4, "swa_sink_tokens": 2},
    "whole_stick": {"mixer": "stick_breaking", "stick_breaking_remainder": True},
    "sigmoid_learned": {"mixer": "sigmoid", "sigmoid_bias_learnable": True},
    **{f"lazy_{name}": {"mixer": "lazy", **ABLATIONS[name]} for name in ("bare", "constant", "one_tau")},
}


def model_of(case: str, **fields: object) -> Transformer:
    """Three layers; weights near their usual size, so that rounding stays far below 1e-5 of a logit."""
    model = awake(tiny(**{"num_layers": 3, "num_kv_heads": 2, **CASES[case], **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.endswith(".weight"):
                parameter.mul_(0.5)
    return model


def gradients(model: Transformer, logits: Tensor, seen: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logits * seen).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pattern", ["uniform", [2]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_packed_row_is_its_documents_one_by_one(monkeypatch: pytest.MonkeyPatch, case: str, pattern: object) -> None:
    monkeypatch.setattr(query_blocks, "QUERY_ROWS", 6)  # the longest document takes several blocks
    model = model_of(case, pattern=pattern)
    tokens = some_tokens(1, TOTAL)
    seen = torch.randn(1, TOTAL, VOCAB, generator=torch.Generator().manual_seed(0))
    packed = model(tokens, cu_seqlens=CU_SEQLENS)
    assert packed.shape == (1, TOTAL, VOCAB)
    alone = torch.cat([model(document) for document in tokens.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    # Unpacked, the same row is something else: the borders matter.
    if case != "mlp" or pattern != "uniform":
        assert not torch.allclose(model(tokens[:, :32]), alone[:, :32], atol=1e-2)
    found, expected = gradients(model, packed, seen), gradients(model, alone, seen)
    assert found.keys() == expected.keys() and len(found) >= len(list(model.parameters())) - 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-6)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_no_document_reaches_another(case: str) -> None:
    """Each token of the middle document is changed in turn; at least its own logits follow."""
    model = model_of(case)
    tokens = some_tokens(1, TOTAL)
    before = model(tokens, cu_seqlens=CU_SEQLENS)
    for position in (6, 13, 22):  # document 2 lies at 6 ... 22
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCAB
        after = model(changed, cu_seqlens=CU_SEQLENS)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
        torch.testing.assert_close(after[:, 23:], before[:, 23:], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_autocast_stays_near_float32(case: str) -> None:
    model = model_of(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    tokens = some_tokens(1, TOTAL)
    expected = model(tokens, cu_seqlens=CU_SEQLENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens, cu_seqlens=CU_SEQLENS)
        logits.square().mean().backward()
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < 0.03 * expected.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("case", [name for name in CASES if name != "mlp"])
@torch.no_grad()
def test_rows_and_sparsity_are_those_of_the_documents(case: str) -> None:
    model = model_of(case, pattern=[2])
    tokens = some_tokens(1, TOTAL)
    rows: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    for layer, start, weights in model.attention_rows(tokens, 7, CU_SEQLENS):
        assert start == 7 * len(rows[layer]) and weights.shape == (1, 4, min(7, TOTAL - start), TOTAL)
        rows[layer].append(weights)
    expected = torch.zeros(3, 4, TOTAL, TOTAL)
    zeros, pairs, begin = torch.zeros(3), 0, 0
    for document in tokens.split(LENGTHS, dim=1):
        length = document.shape[1]
        for layer, _, weights in model.attention_rows(document, length):
            expected[layer, :, begin : begin + length, begin : begin + length] = weights[0]
        shares = sparsity_by_layer(model, document)
        if shares is not None:
            count = length * (length + 1) / 2
            zeros += torch.tensor([float("nan") if share is None else share * count for share in shares])
        pairs += length * (length + 1) // 2
        begin += length
    for layer, blocks in rows.items():
        torch.testing.assert_close(torch.cat(blocks, dim=2)[0], expected[layer], rtol=1e-4, atol=1e-6)
    shares = sparsity_by_layer(model, tokens, CU_SEQLENS)
    if shares is None:
        assert (zeros == 0).all()
    else:
        found = torch.tensor([float("nan") if share is None else share for share in shares])
        torch.testing.assert_close(found, zeros / pairs, rtol=0, atol=2e-3, equal_nan=True)
        assert found[1].isnan()


def test_documents_of_one_length_are_one_batch() -> None:
    documents = Documents.packed(CU_SEQLENS, some_tokens(1, TOTAL))
    assert documents.positions.tolist() == [position for length in LENGTHS for position in range(length)]
    calls: list[torch.Size] = []

    def running(x: Tensor, y: Tensor) -> Tensor:
        calls.append(x.shape)
        return x.cumsum(2) + y[..., None]

    x, y = torch.arange(TOTAL).float()[None, None, :, None], torch.zeros(1, 1, TOTAL)
    out = documents.each(running, x, y)[0, 0, :, 0]
    expected = torch.cat([piece.cumsum(0) for piece in torch.arange(TOTAL).float().split(LENGTHS)])
    assert torch.equal(out, expected)
    assert [tuple(shape) for shape in calls] == [(4, 1, 1, 1), (2, 1, 5, 1), (1, 1, 17, 1), (1, 1, 9, 1)]


def test_the_side_sequence_goes_through_the_stack_once_for_all_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    compute = Transformer._side_maps
    monkeypatch.setattr(Transformer, "_side_maps", lambda self, length: lengths.append(length) or compute(self, length))
    for case in ("random_qk", "text_qk"):
        model = model_of(case)
        row = some_tokens(1, 40)
        model(row, cu_seqlens=torch.tensor([0, 32, 40], dtype=torch.int32)).sum().backward()
        with pytest.raises(ValueError, match="33 tokens are more than max_seq_len=32"):
            model(row, cu_seqlens=torch.tensor([0, 33, 40], dtype=torch.int32))
    assert lengths == [32, 32]  # the longest document: beyond the row's own 40 there would be no sequence left


def test_memory_grows_with_the_longest_document_and_not_with_the_row() -> None:
    """What autograd keeps between the passes of 32 documents of 16 tokens: no matrix over the row."""
    cu_seqlens = torch.arange(0, 513, 16).int()
    for case in ("standard", "alibi", "sigmoid", "entmax", "lazy", "gating", "elliptical", "taylor", "swa"):
        mixer, largest = model_of(case, num_layers=1), 0

        def record(tensor: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            mixer(some_tokens(1, 512), cu_seqlens=cu_seqlens)
        assert largest <= 512 * 96, case  # the MLP's width; [512, 512] per head would be 1,048,576


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 5, 9]), r"torch\.int64 \[3\]; expected int32 \[documents \+ 1\]"),
        (torch.tensor([0], dtype=torch.int32), r"int32 \[1\]; expected int32"),
        (torch.tensor([[0, 9]], dtype=torch.int32), r"int32 \[1, 2\]; expected int32"),
        (torch.tensor([0, 5, 8], dtype=torch.int32), r"\[0, 5, 8\]; expected numbers that rise from 0 to 9"),
        (torch.tensor([1, 5, 9], dtype=torch.int32), r"\[1, 5, 9\]; expected numbers that rise from 0 to 9"),
        (torch.tensor([0, 5, 5, 9], dtype=torch.int32), r"at least one token to a document"),
        (torch.tensor([0, 7, 5, 9], dtype=torch.int32), r"\[0, 7, 5, 9\]; expected numbers that rise"),
        (torch.tensor([0, *range(20, 40), 9], dtype=torch.int32), r"\[0, 20, 21, 22, 23, 24, \.\.\. 38, 39, 9\]"),
    ],
)
@pytest.mark.parametrize("mixer", ["standard", "lazy", "mlp"])
def test_borders_that_do_not_fit_are_refused(mixer: str, cu_seqlens: Tensor, message: str) -> None:
    model = awake(tiny(mixer))
    for call in (model.forward, model.statistics_by_layer):
        with pytest.raises(ValueError, match=rf"cu_seqlens is .*{message}"):
            call(some_tokens(1, 9), cu_seqlens=cu_seqlens)


def test_packing_takes_one_row_and_no_cache() -> None:
    model, cu_seqlens = awake(tiny("standard")), torch.tensor([0, 5, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"tokens has shape \[2, 9\]; expected one row"):
        model(some_tokens(2, 9), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="either cache or cu_seqlens"):
        model(some_tokens(1, 9), model.new_cache(9), cu_seqlens)
