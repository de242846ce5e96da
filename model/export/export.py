"""A checkpoint as a Hugging Face folder, which loads where this project is not installed.

    config.json, generation_config.json     for AutoConfig and generate()
    model.safetensors                       the checkpoint's weights, float32
    tokenizer.json, tokenizer_config.json   for AutoTokenizer; as trained on: it adds no special tokens
    configuration_lazypipe.py,              copies of those beside this file, which need torch and transformers alone
    modeling_lazypipe.py
    README.md                               the model card

Only safetensors and JSON are read; nothing is unpickled, and no code of the folder runs while it is made.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lazypipe.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, Checkpoint, load_checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.registry import MECHANISMS, STANDARD
from lazypipe.model.transformer import count_parameters

# What the modelling file knows of a ModelConfig. Any other field that is not at its default makes another model.
EXPORTED_FIELDS = frozenset(
    {
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "intermediate_size",
        "max_seq_len",
        "mixer",
        "pattern",
        "qk_norm",
        "rope_theta",
        "norm_eps",
        "tie_embeddings",
        "max_bias_length",
    }
)
# Where training started, and fields of mixers that are not exported: they say nothing about these weights.
WITHOUT_EFFECT = frozenset({"init_std", "tau_init", "bias_init_std"}).union(
    *(row.fields for row in MECHANISMS.values() if not row.exportable)
)
CODE = Path(__file__).parent
CODE_FILES = ("configuration_lazypipe.py", "modeling_lazypipe.py")
MODEL_TYPE = "lazypipe"
CARD_FILE = "README.md"


class ExportError(ValueError):
    """An export that is refused: names the object, what was found, what was expected and what to do."""


def export_huggingface(
    checkpoint_dir: Path, target: Path, force: bool = False, origin: Mapping[str, str] | None = None
) -> Path:
    """Write the folder of the module docstring at `target` and return it, absolute. It appears whole or not at all.

    force: replace an earlier export at `target`; anything else there stays. origin: rows for the model card.
    Raises CheckpointError for a checkpoint that cannot be used, ExportError for one that cannot be exported and for a
    target that is taken.
    """
    target = Path(os.path.abspath(target.expanduser()))  # noqa: PTH100  (a link stays a link, so that force can refuse it)
    _check_target(target, force)
    _check_config(_model_config(checkpoint_dir))
    checkpoint = load_checkpoint(checkpoint_dir)
    temporary, replaced = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        temporary.mkdir(parents=True)
        _write(temporary, checkpoint, origin or {})
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error}; choose another target") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)  # as it was
        shutil.rmtree(replaced, ignore_errors=True)
    return target


def _check_target(target: Path, force: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target} is no folder; choose a new or an empty one")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise ExportError(f"{target} is not empty; choose another folder, or replace an earlier export with --force")
    try:
        found = json.loads((target / CONFIG_FILE).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != MODEL_TYPE:
        raise ExportError(f"{target} holds something else than an export; remove it, or choose another folder")


def _model_config(directory: Path) -> dict[str, Any]:
    """The stored model fields, {} when they cannot be read: `load_checkpoint` then says what is wrong."""
    try:
        fields = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _check_config(fields: Mapping[str, Any]) -> None:
    """Refuse what the modelling file does not compute, whatever fields future versions add."""
    mixer = fields.get("mixer", STANDARD)
    exportable = [name for name, row in MECHANISMS.items() if row.exportable]
    if mixer not in exportable:
        raise ExportError(
            f"model.mixer={mixer} cannot be exported; the exported modelling file knows {', '.join(exportable)}"
        )
    for name, value in fields.items():
        known = ModelConfig.model_fields.get(name)
        if name in EXPORTED_FIELDS | WITHOUT_EFFECT or known is None or value == known.get_default():
            continue
        raise ExportError(
            f"model.{name}={value!r} cannot be exported: the exported modelling file knows no {name} and would compute "
            f"another model; only {name}={known.get_default()!r} can be"
        )


def _write(folder: Path, checkpoint: Checkpoint, origin: Mapping[str, str]) -> None:
    weights = {
        "lm_head.weight" if name == "head.weight" else name: tensor.contiguous()
        for name, tensor in checkpoint.model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(folder / CONFIG_FILE, huggingface_config(checkpoint))
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)  # safetensors leaves it to the owner alone
    special = {"bos_token_id": checkpoint.eos_id, "eos_token_id": checkpoint.eos_id, "pad_token_id": checkpoint.eos_id}
    _write_json(folder / "generation_config.json", special)
    for name in CODE_FILES:
        shutil.copyfile(CODE / name, folder / name)
    if checkpoint.tokenizer_path.is_file():
        _write_tokenizer(folder, checkpoint)
    (folder / CARD_FILE).write_text(model_card(checkpoint, origin), encoding="utf-8")


def huggingface_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json: the names of transformers for what a `ModelConfig` says."""
    config = checkpoint.model.config
    return {
        "architectures": ["LazypipeForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_lazypipe.LazypipeConfig",
            "AutoModelForCausalLM": "modeling_lazypipe.LazypipeForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "dtype": "float32",
        "vocab_size": checkpoint.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "mixer_intermediate_size": config.mlp_mixer_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "layer_mixers": list(config.layer_mixers),
        "max_position_embeddings": config.max_seq_len,
        "max_bias_length": config.max_bias_length,
        "qk_norm": config.qk_norm,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": checkpoint.eos_id,
        "eos_token_id": checkpoint.eos_id,
        "pad_token_id": checkpoint.eos_id,
    }


def _write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """The tokenizer without post-processor: a template would add tokens that no training text began with."""
    try:
        content = json.loads(checkpoint.tokenizer_path.read_text(encoding="utf-8"))
        content["post_processor"] = None
        eos = _token(content, checkpoint.eos_id)
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise ExportError(
            f"{checkpoint.tokenizer_path} is not a tokenizer.json with a token {checkpoint.eos_id}: {error!r}; "
            "train again, or restore the file"
        ) from error
    (folder / TOKENIZER_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "pad_token": eos,
        "padding_side": "left",
        "model_max_length": checkpoint.model.config.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _token(content: Mapping[str, Any], token_id: int) -> str:
    """The text of a token id; LookupError or StopIteration when the tokenizer has no such id."""
    for added in content.get("added_tokens") or ():
        if added["id"] == token_id:
            return str(added["content"])
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [text, score] by id
        return str(vocabulary[token_id][0])
    return str(next(text for text, number in vocabulary.items() if number == token_id))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_card(checkpoint: Checkpoint, origin: Mapping[str, str]) -> str:
    """README.md of the folder."""
    config = checkpoint.model.config
    total, non_embedding = count_parameters(checkpoint.model)
    rows = {
        "mixer": f"`{config.mixer}`",
        "layers": ", ".join(config.layer_mixers),
        "parameters": f"{total:,} ({non_embedding:,} outside the embeddings)",
        "context length": f"{config.max_seq_len:,} tokens",
        "vocabulary": f"{checkpoint.vocab_size:,}",
        **origin,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    limit = ""
    if config.too_long(config.max_seq_len + 1) is not None:
        limit = (
            f"\nInputs and continuations together end at {config.max_seq_len:,} tokens, as the side sequence does.\n"
        )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [lazypipe, {config.mixer}]
---

# {origin.get("variant", config.mixer)}

A language model pretrained and exported by lazypipe. The code that defines it is `modeling_lazypipe.py` in this folder,
in plain torch.

| | |
|---|---|
{table}
{limit}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["Once upon a time", "The king"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40), skip_special_tokens=True))
```

The tokenizer adds no special tokens; `eos_token` ended every training document and begins an unprompted continuation.
"""
