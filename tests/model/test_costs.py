"""Estimated costs against what torch counts on real, small models: operations, parameters, saved tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lazypipe.model import costs
from lazypipe.model.config import ModelConfig, parameter_count
from lazypipe.model.loss import next_token_loss
from lazypipe.model.mixers.costs import CONSTANT_LAZY_PAIRS, QUERY_ROWS, TAYLOR_STATE_FROM
from lazypipe.model.mixers.registry import MIXERS
from lazypipe.model.transformer import Transformer, count_parameters
from tests.test_imports import loaded_by

ROWS, VOCAB = 3, 50
HIDDEN, LENGTH = 32, 24
SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_layers": 3, "num_heads": 2, "max_seq_len": LENGTH, "max_bias_length": 8,
    "swa_window": LENGTH, "intermediate_size": 80,
}  # fmt: skip


def built(**fields: Any) -> Transformer:
    model = Transformer(ModelConfig.model_validate({**SMALL, **fields}), VOCAB, kernel="reference")
    if model.config.mixer == "text_qk":
        assert model.side is not None
        model.side.set_tokens(torch.arange(model.side.length) % VOCAB)
    return model


def windows(length: int, rows: int = ROWS) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(0))


def counted(model: Transformer, length: int, backward: bool) -> int:
    """Operations that torch counts, where every attention is plain matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = next_token_loss(model, windows(length))
        if backward:
            loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("pattern", ["uniform", "even"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_operations_are_those_that_torch_counts(mixer: str, pattern: str) -> None:
    model = built(mixer=mixer, pattern=pattern, num_kv_heads=1 if mixer in ("standard", "lazy", "mlp") else None)
    tokens = ROWS * LENGTH
    forward = costs.forward_flops_per_token(model.config, VOCAB, LENGTH, ROWS) * tokens
    # A key of no value is one more column in softmax1; in sink it takes coordinates of their own in every head as well.
    tolerance = {"softmax1": 0.02, "sink": 0.08}.get(mixer, 1e-9)
    assert counted(model, LENGTH, backward=False) == pytest.approx(forward, rel=tolerance)
    training = costs.training_flops_per_token(model.config, VOCAB, LENGTH, ROWS) * tokens
    # A random side sequence needs no gradient, so its first layer passes none on.
    tolerance = max(tolerance, 0.03 if mixer == "random_qk" else 0)
    assert counted(model, LENGTH, backward=True) == pytest.approx(training, rel=tolerance)


def test_the_linear_form_of_taylor_is_counted_where_it_runs() -> None:
    length = 256
    model = built(mixer="taylor", hidden_size=16, max_seq_len=length)
    features = model.layers[0].mixer.features
    assert length > TAYLOR_STATE_FROM * features
    forward = costs.forward_flops_per_token(model.config, VOCAB, length, ROWS) * ROWS * length
    with torch.no_grad():
        assert counted(model, length, backward=False) == pytest.approx(forward, rel=1e-9)


def test_a_window_is_counted_up_to_its_width() -> None:
    config = ModelConfig.model_validate({**SMALL, "mixer": "swa", "swa_window": 5, "swa_sink_tokens": 2})
    full = ModelConfig.model_validate(SMALL)
    saved = costs.forward_flops_per_token(full, 9, 24, 1) - costs.forward_flops_per_token(config, 9, 24, 1)
    assert saved == 3 * 4 * (24 - 7) * HIDDEN


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixer", MIXERS)
def test_parameters_are_those_of_the_built_model(mixer: str, tied: bool) -> None:
    fields = {"mixer": mixer, "pattern": "even", "qk_norm": True, "num_kv_heads": 1, "tie_embeddings": tied}
    with torch.device("meta"):
        model = built(**fields) if mixer != "text_qk" else Transformer(built(**fields).config, VOCAB)
    counted = count_parameters(model)
    assert (parameter_count(model.config, VOCAB), costs.non_embedding_parameters(model.config)) == counted


def saved_bytes(model: Transformer, length: int, half: bool) -> int:
    """Bytes of all tensors that the backward pass of one micro-batch keeps, weights and their copies left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        loss = next_token_loss(model, windows(length))
    assert loss.requires_grad
    return sum(sizes.values())


CONSTANT = {"lazy_threshold": "constant", "tau_init": -0.01}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("mixer", "fields"),
    [*((mixer, {}) for mixer in MIXERS), ("lazy", CONSTANT), *((mixer, {"qk_norm": True}) for mixer in MIXERS)],
)
def test_activations_are_an_upper_estimate_of_the_saved_tensors(mixer: str, fields: dict[str, Any], half: bool) -> None:
    length = 96
    model = built(mixer=mixer, hidden_size=64, num_layers=4, max_seq_len=length, intermediate_size=192, **fields)
    model_of_lazy = Transformer(model.config, VOCAB)  # not the reference, which keeps every pair
    if mixer == "lazy":
        model = model_of_lazy
    kind = "bfloat16" if half else "float32"
    memory = costs.training_memory(model.config, VOCAB, length, ROWS, kind)  # type: ignore[arg-type]
    copies = memory.weights // 3 if half else 0
    saved = saved_bytes(model, length, half)
    if "qk_norm" in fields:  # the layer that is counted again would hide it
        deeper = Transformer(model.config.model_copy(update={"num_layers": 8}), VOCAB)
        if mixer == "text_qk":
            assert deeper.side is not None
            deeper.side.set_tokens(torch.arange(length) % VOCAB)
        more = costs.training_memory(deeper.config, VOCAB, length, ROWS, kind)  # type: ignore[arg-type]
        more_copies = (more.weights - memory.weights) // 3 if half else 0
        growth = more.activations - memory.activations + more_copies
        assert saved_bytes(deeper, length, half) - saved < 1.001 * growth  # of mlp, every tensor is counted exactly
    assert saved < memory.activations + memory.logits + copies < 1.9 * saved


def test_beyond_a_block_of_queries_a_constant_threshold_keeps_no_pairs() -> None:
    length = 2 * QUERY_ROWS
    relative = built(mixer="lazy", max_seq_len=length).config
    constant = built(mixer="lazy", max_seq_len=length, **CONSTANT).config
    one, other = (costs.training_memory(c, VOCAB, length, ROWS, "float32").activations for c in (relative, constant))
    assert other - one == ROWS * length * 2 * CONSTANT_LAZY_PAIRS[0] * 2 * QUERY_ROWS


def test_memory_of_weights_and_optimizer_is_theirs() -> None:
    model = built()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = costs.training_memory(model.config, VOCAB, LENGTH, ROWS, "float32")
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert memory.total == 16 * parameters + memory.activations + memory.logits
    several = costs.training_memory(model.config, VOCAB, LENGTH, ROWS, "float32", workers=2)
    assert several.total - memory.total == 4 * parameters
    assert costs.training_memory(model.config, VOCAB, LENGTH, 2 * ROWS, "float32").logits == 2 * memory.logits


def test_a_side_sequence_costs_less_per_token_with_more_rows() -> None:
    for mixer in ("random_qk", "text_qk"):
        config = built(mixer=mixer).config
        few, many = (costs.training_flops_per_token(config, VOCAB, LENGTH, rows) for rows in (1, 100))
        assert few > 1.3 * many


def test_costs_load_no_torch() -> None:
    assert loaded_by("import model.costs", {"torch", "numpy"}) == []
