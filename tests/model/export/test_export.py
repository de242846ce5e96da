"""An exported folder, loaded by transformers where this project is not installed, is the model it was made from."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from lazypipe.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.model.export.export import (
    EXPORTED_FIELDS,
    WITHOUT_EFFECT,
    ExportError,
    export_huggingface,
)
from lazypipe.model.generate import generate
from lazypipe.model.mixers.registry import MIXERS
from lazypipe.model.transformer import Transformer
from tests.model.tiny_model import VOCAB, awake, some_tokens, tiny

PROJECT = Path(__file__).parents[3]
EOS = 0
SHAPES: dict[str, dict[str, Any]] = {
    "uniform": {"num_layers": 3},
    "even": {"num_layers": 4, "pattern": "even", "tie_embeddings": False, "num_kv_heads": 2, "qk_norm": True},
}
EXPORTED = [mixer for mixer, row in MIXERS.items() if row.exportable]
CASES = [f"{mixer}-{shape}" for mixer in EXPORTED for shape in SHAPES if (mixer, shape) != ("standard", "even")]
LONG = 300  # beyond max_seq_len = 32, W = 8, the 63 tokens from which taylor uses its state, a block of 256 queries


def config_of(case: str) -> ModelConfig:
    mixer, shape = case.split("-")
    extra: dict[str, Any] = (
        {"num_kv_heads": 2, "qk_norm": True, "tie_embeddings": False} if case == "standard-uniform" else {}
    )
    return tiny(mixer, **{**SHAPES[shape], **extra})


def inputs_of(config: ModelConfig) -> dict[str, Tensor]:
    """Batches of every kind. Ragged rows are 4, 9 and 12 tokens; the long ones are padded on either side by 0, 5, 9."""
    tokens = some_tokens(2, 20)
    labels = tokens.clone()
    labels[0, 3:9] = labels[1, :2] = -100
    lengths = torch.tensor([4, 9, 12])
    places = torch.arange(12)
    mask = (places >= 12 - lengths[:, None]).long()
    length = config.max_seq_len if config.mechanism.side_sequence else LONG
    long, padding = some_tokens(3, length, seed=4), torch.tensor([0, 5, 9])[:, None]
    left = (torch.arange(length) >= padding).long()
    return {
        "tokens": tokens,
        "labels": labels,
        "ragged": some_tokens(3, 12, seed=2) * mask,
        "mask": mask,
        "long": long,
        "long_left": long,
        "long_left_mask": left,
        "long_right": long,
        "long_right_mask": left.flip(1).contiguous(),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What isolated_export.py found for all cases, in one process: transformers takes long to load."""
    base = tmp_path_factory.mktemp("exports")
    jobs = []
    for case in CASES:
        model, inputs = awake(config_of(case)), inputs_of(config_of(case))
        save_checkpoint(base / "checkpoints" / case, model, EOS, None)
        save_file({name: tensor.contiguous().clone() for name, tensor in inputs.items()}, base / f"{case}.safetensors")
        folder = export_huggingface(base / "checkpoints" / case, base / "exports" / case)
        jobs.append({"name": case, "folder": str(folder), "inputs": str(base / f"{case}.safetensors")})
    site = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (base / "jobs.json").write_text(json.dumps({"site": site, "project": str(PROJECT), "jobs": jobs}))
    empty = base / "empty"
    empty.mkdir()
    script = Path(__file__).with_name("isolated_export.py")
    command = [sys.executable, "-I", "-S", str(script), str(base / "jobs.json"), str(base / "results.safetensors")]
    environment = {"HF_HOME": str(base / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(empty)}
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(base / "results.safetensors")


def same(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest logit: of 1 at least, and about 10 in these models, whose weights are large."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_are_ours(results: dict[str, Tensor], case: str) -> None:
    model, inputs = awake(config_of(case)), inputs_of(config_of(case))
    expected = model(inputs["tokens"])
    for name in ("logits", "cached", "stepwise", "embedded", "saved_again"):
        same(results[f"{case}/{name}"], expected)
    same(results[f"{case}/last"], expected[:, -1:])
    long = model(inputs["long"])
    same(results[f"{case}/long"], long)
    same(results[f"{case}/long_cached"], long)
    targets = inputs["labels"][:, 1:]
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    same(results[f"{case}/loss"], loss[None])
    error = (results[f"{case}/half"] - expected).abs().mean() / expected.std()
    assert error < 0.15, "bfloat16 is far off"


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_padded_row_gives_what_it_gives_alone(results: dict[str, Tensor], case: str) -> None:
    model, inputs = awake(config_of(case)), inputs_of(config_of(case))
    for side in ("left", "right"):
        for row, real in enumerate(inputs[f"long_{side}_mask"].bool()):
            alone = model(inputs[f"long_{side}"][row : row + 1, real])
            same(results[f"{case}/long_{side}"][row : row + 1, real], alone)
    for row, real in enumerate(inputs["mask"].bool()):
        tokens = torch.cat((inputs["ragged"][row : row + 1, real], inputs["tokens"][:1, :2]), dim=1)
        expected = model(tokens)[:, -2:]
        same(results[f"{case}/after_padding"][row : row + 1], expected)
        same(results[f"{case}/mask_remembered"][row : row + 1], expected)


@pytest.mark.parametrize("case", CASES)
def test_generate_continues_as_ours(results: dict[str, Tensor], case: str) -> None:
    model, inputs = awake(config_of(case)), inputs_of(config_of(case))
    ours = generate(model, inputs["tokens"], 8, stop_token=EOS)
    assert torch.equal(results[f"{case}/greedy"], ours)
    padded = results[f"{case}/greedy_padded"]
    for row, real in enumerate(inputs["mask"].bool()):
        alone = generate(model, inputs["ragged"][row : row + 1, real], 8, stop_token=EOS)[0, int(real.sum()) :]
        assert torch.equal(padded[row, 12 : 12 + len(alone)], alone)
    for name in ("beams", "sampled"):  # the cache, reordered among beams, changes nothing
        assert torch.equal(results[f"{case}/{name}_True"], results[f"{case}/{name}_False"])
    assert not torch.equal(results[f"{case}/sampled_True"], padded)


def trained_folder(folder: Path, mixer: str = "lazy", **fields: object) -> Path:
    """A checkpoint with a byte-level tokenizer whose post-processor would add a token."""
    letters = ["<|endoftext|>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(letters)}, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>", "<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "any.json"))
    save_checkpoint(folder / "checkpoint", Transformer(tiny(mixer, **fields), len(letters)), 0, folder / "any.json")
    return folder / "checkpoint"


def test_the_tokenizer_encodes_what_the_model_was_trained_on(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint = trained_folder(tmp_path)
    target = export_huggingface(checkpoint, tmp_path / "deep" / "export", origin={"variant": "lazy_short"})
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=True)
    texts = ["To be, or not", "naïve €", " x"]
    ours = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    expected = [ours.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer(texts).input_ids == expected
    assert tokenizer.batch_decode(expected) == texts
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side)
    assert special == (0, 0, 0, "left")
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1
    card = (target / "README.md").read_text()
    assert "# lazy_short" in card and "| layers | lazy, lazy |" in card
    total = sum(parameter.numel() for parameter in load_checkpoint(checkpoint).model.parameters())
    assert f"| parameters | {total:,} (" in card
    assert sorted(path.name for path in target.iterdir()) == [
        *("README.md", "config.json", "configuration_lazypipe.py", "generation_config.json", "model.safetensors"),
        *("modeling_lazypipe.py", "tokenizer.json", "tokenizer_config.json"),
    ]


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer not in EXPORTED])
def test_other_mixers_are_refused_with_the_names_of_the_eight(tmp_path: Path, mixer: str) -> None:
    save_checkpoint(tmp_path / "checkpoint", Transformer(tiny(mixer), VOCAB), EOS, None)
    with pytest.raises(ExportError, match=f"model.mixer={mixer} .* standard, lazy, mlp, taylor, gating, random_qk"):
        export_huggingface(tmp_path / "checkpoint", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_field_that_the_modelling_file_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field is either computed, or without effect, or refused when it is not at its default."""
    assert not EXPORTED_FIELDS & WITHOUT_EFFECT
    assert set(ModelConfig.model_fields) >= EXPORTED_FIELDS | WITHOUT_EFFECT
    checkpoint = trained_folder(tmp_path, qk_norm=True, init_std=0.03, swa_window=7)
    export_huggingface(checkpoint, tmp_path / "known")
    monkeypatch.setattr("lazypipe.model.export.export.EXPORTED_FIELDS", EXPORTED_FIELDS - {"qk_norm"})
    with pytest.raises(ExportError, match=r"model.qk_norm=True cannot be exported.*only qk_norm=False can be"):
        export_huggingface(checkpoint, tmp_path / "export")


def test_an_export_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, target = trained_folder(tmp_path), tmp_path / "export"
    target.mkdir()
    export_huggingface(checkpoint, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ExportError, match="is not empty"):
        export_huggingface(checkpoint, target)
    with monkeypatch.context() as patch:
        patch.setattr("lazypipe.model.export.export.CODE_FILES", ("modeling_lazypipe.py", "absent.py"))
        with pytest.raises(ExportError, match="cannot write"):
            export_huggingface(checkpoint, target, force=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    (target / "leftover").write_text("of an earlier export")
    export_huggingface(checkpoint, target, force=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(ExportError, match="something else than an export"):
        export_huggingface(checkpoint, tmp_path / "home", force=True)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ExportError, match="is no folder"):
        export_huggingface(checkpoint, tmp_path / "link", force=True)
    assert (tmp_path / "home" / "letters.txt").exists()
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        export_huggingface(checkpoint, tmp_path / "other")


def test_what_the_model_is_given_wrongly_is_said() -> None:
    from lazypipe.model.export.configuration_lazypipe import LazypipeConfig
    from lazypipe.model.export.modeling_lazypipe import LazypipeForCausalLM

    small: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2, "max_position_embeddings": 6}
    with pytest.raises(ValueError, match=r"layer_mixers=\['swa'\]"):
        LazypipeConfig(**small, layer_mixers=["swa"])
    model = LazypipeForCausalLM(LazypipeConfig(**small, layer_mixers=["random_qk"])).eval()
    tokens = torch.arange(7)[None]
    with pytest.raises(ValueError, match="7 tokens are more than max_position_embeddings=6"):
        model(tokens)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 4\]; expected \[1, 5\]"):
        model(tokens[:, :5], attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="past_key_values is a str"):
        model(tokens, past_key_values="all of them")


@torch.no_grad()
def test_the_side_maps_are_made_once_and_again_when_a_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from lazypipe.model.export.configuration_lazypipe import LazypipeConfig
    from lazypipe.model.export.modeling_lazypipe import LazypipeForCausalLM

    config = LazypipeConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, layer_mixers=["random_qk", "standard"])
    model = LazypipeForCausalLM(config).eval()
    made = []
    compute = model._compute_maps
    monkeypatch.setattr(model, "_compute_maps", lambda length: made.append(length) or compute(length))
    model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False)
    assert made == [config.max_position_embeddings]
    before = model(torch.arange(5)[None]).logits
    model.layers[0].mixer.q_proj.weight.mul_(3)
    assert not torch.equal(model(torch.arange(5)[None]).logits, before)
    assert len(made) == 2
