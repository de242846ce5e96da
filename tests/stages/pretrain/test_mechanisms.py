"""Every mechanism, alone and in hybrids: it learns, resumes bit for bit, decodes step by step, never looks ahead."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lazypipe.model.checkpoint import load_checkpoint
from lazypipe.model.generate import generate
from lazypipe.model.mixers.registry import MIXERS
from lazypipe.model.pattern import PATTERNS
from lazypipe.model.transformer import Transformer
from lazypipe.stages.contract import Artifact, Context, Interrupted
from lazypipe.stages.facts import TokenizeFacts
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.config import PretrainConfig
from tests.model.tiny_model import VOCAB, awake, some_tokens, tiny, with_side_text
from tests.stages.pretrain.toy_training import context_in, tiny_run

pytestmark = pytest.mark.usefixtures("one_thread")

MIXES_NOTHING = {"mlp"}  # a token changes its own position only


@pytest.mark.parametrize("pattern", ["uniform", "even"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mechanism_learns_resumes_decodes_and_never_looks_ahead(
    corpus: Artifact, tmp_path: Path, mixer: str, pattern: str
) -> None:
    learns_and_resumes(config_of(mixer, pattern), corpus, tmp_path)
    model = load_checkpoint(tmp_path / "whole" / "output" / "checkpoint").model
    vocab_size = TokenizeFacts.read(corpus.manifest).vocab_size
    decodes_like_the_full_forward(model, vocab_size, length=40)
    sees_no_later_token(model, vocab_size, mixes=mixer not in MIXES_NOTHING or pattern != "uniform")


@pytest.mark.long
@pytest.mark.parametrize("pattern", [*PATTERNS, "1 4 6"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mechanism_in_every_pattern(corpus: Artifact, tmp_path: Path, mixer: str, pattern: str) -> None:
    config = config_of(mixer, [1, 4, 6] if pattern == "1 4 6" else pattern, num_layers=6)
    learns_and_resumes(config, corpus, tmp_path)
    model = load_checkpoint(tmp_path / "whole" / "output" / "checkpoint").model
    vocab_size = TokenizeFacts.read(corpus.manifest).vocab_size
    decodes_like_the_full_forward(model, vocab_size, length=60)
    sees_no_later_token(model, vocab_size, mixes=mixer not in MIXES_NOTHING or pattern != "uniform")


@pytest.mark.parametrize("fields", [{}, {"num_kv_heads": 2}, {"qk_norm": True}, {"pattern": [2]}], ids=str)
@pytest.mark.parametrize("mixer", MIXERS)
def test_large_random_weights_decode_and_stay_causal(mixer: str, fields: dict[str, object]) -> None:
    model = awake(tiny(mixer, max_seq_len=40, **fields))
    decodes_like_the_full_forward(model, VOCAB, length=40)
    sees_no_later_token(model, VOCAB, mixes=mixer not in MIXES_NOTHING or "pattern" in fields)


@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_autocast_stays_near_float32(mixer: str) -> None:
    model = with_side_text(Transformer(tiny(mixer), VOCAB)).eval()
    tokens = some_tokens(2, 24)
    expected = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
        logits.sum().backward()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.02)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def config_of(mixer: str, pattern: object, **fields: object) -> PretrainConfig:
    config = tiny_run(mixer, steps=16, checkpoint_every=6, validate_every=16)
    model = {**config.model.model_dump(), "pattern": pattern, **fields}
    return PretrainConfig.model_validate({**config.model_dump(), "model": model})


def learns_and_resumes(config: PretrainConfig, corpus: Artifact, directory: Path) -> None:
    """Train once undisturbed, below the loss of guessing; once stopped half way and resumed, to the same bits."""

    class StopAfter6(Context):
        stop_requested = property(lambda self: (self.scratch_dir / "checkpoints" / "step-00000006").exists())

    inputs = {"tokenize": corpus}
    # Not in the background: a run is stopped by the sight of its checkpoint.
    config = config.model_copy(update={"async_checkpoints": False})
    whole = pretrain.run(config, inputs, context_in(directory / "whole"))
    assert whole.facts.nonfinite_steps == 0
    assert whole.metrics["validation_loss"] < math.log(TokenizeFacts.read(corpus.manifest).vocab_size) - 2.0
    plain = context_in(directory / "halves")
    with pytest.raises(Interrupted, match="step 7 of 16"):
        pretrain.run(config, inputs, StopAfter6(plain.output_dir, plain.scratch_dir))
    resumed = pretrain.run(config, inputs, plain)
    assert (resumed.facts.resumed_from, resumed.facts.steps_executed) == (7, 9)
    expected, found = (
        load_file(directory / half / "output" / "checkpoint" / "model.safetensors") for half in ("whole", "halves")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@torch.no_grad()
def decodes_like_the_full_forward(model: Transformer, vocab_size: int, length: int) -> None:
    """One token at a time and in uneven pieces; greedy generation is the argmax of the full forward."""
    tokens = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    full = model(tokens)
    for pieces in ([1] * length, [13, 1, 20, length - 34]):
        cache = model.new_cache(length)
        parts = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"room for {length} tokens and {length + 1} were given"):
        model(tokens[:, :1], cache)
    continued = generate(model, tokens[:, :5], 6)
    for position in range(5, 11):
        logits = model(continued[:, :position])[:, -1]
        chosen = logits.gather(-1, continued[:, position : position + 1])[:, 0]
        torch.testing.assert_close(chosen, logits.max(-1).values, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def sees_no_later_token(model: Transformer, vocab_size: int, mixes: bool) -> None:
    """Changing token 11 leaves all logits before it as they were, and reaches the last one if the model mixes."""
    tokens = torch.randint(vocab_size, (1, 24), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 11], after[:, 11], atol=1e-5)
    assert torch.allclose(before[:, 23], after[:, 23], atol=1e-7) != mixes
