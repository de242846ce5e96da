"""What a recipe's fingerprint depends on, and what it must not depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from lazypipe.model.config import ModelConfig
from lazypipe.pipeline.experiment.schema import load_experiment
from lazypipe.pipeline.planning.fingerprint import canonical, fingerprint
from lazypipe.stages.config import StageConfig, flatten, identity, operational, operational_fields
from lazypipe.stages.data.sources import FilesSource, HubSource
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.registry import STAGE_CONFIGS
from lazypipe.stages.report.config import ReportConfig
from lazypipe.stages.tokenization.config import FileTokenizer, TokenizeConfig, TrainTokenizer

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
RECIPE: dict[str, Any] = {"stage": "pretrain", "version": 1, "config": {}, "source": {}, "inputs": {}}

FROZEN_DEFAULTS: dict[tuple[str, int], dict[str, Any]] = {
    ("tokenize", 1): {
        "source.kind": "embedded",
        "tokenizer.kind": "train",
        "tokenizer.vocab_size": 2048,
        "validation_fraction": 0.05,
        "filters.min_chars": 0,
        "filters.exact_duplicates": "keep",
        "token_dtype": "uint16",
        "invalid_utf8": "replace",
    },
    ("pretrain", 1): {
        "model.hidden_size": 128,
        "model.num_layers": 4,
        "model.num_heads": 4,
        "model.num_kv_heads": None,
        "model.intermediate_size": None,
        "model.max_seq_len": 256,
        "model.mixer": "standard",
        "model.pattern": "uniform",
        "model.qk_norm": False,
        "model.rope_theta": 10_000.0,
        "model.norm_eps": 1e-6,
        "model.init_std": 0.02,
        "model.tie_embeddings": True,
        "model.max_bias_length": 512,
        "model.tau_init": -1.0,
        "model.bias_init_std": 1e-3,
        "model.lazy_bias": True,
        "model.lazy_rope": True,
        "model.lazy_elastic": True,
        "model.lazy_tau_scope": "head",
        "model.lazy_threshold": "relative",
        "model.sigmoid_bias": None,
        "model.sigmoid_bias_learnable": False,
        "model.swa_window": 128,
        "model.swa_sink_tokens": 0,
        "model.stick_breaking_remainder": False,
        "steps": 200,
        "seq_len": 256,
        "tokens_per_step": 4096,
        "micro_batch_size": 8,
        "lr": 2e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "decay_fraction": 0.2,
        "min_lr_fraction": 0.1,
        "tau_bias_lr_multiplier": 1.0,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "adam_eps": 1e-8,
        "grad_clip": 1.0,
        "spike_sigma": None,
        "spike_window": 128,
        "seed": 0,
        "dtype": "float32",
        "document_masking": False,
        "sink_balance": 0.0,
        "z_loss": 0.0,
        "validation_windows": 64,
    },
    ("evaluate", 1): {
        "max_tokens": 65_536,
        "max_new_tokens": 48,
        "temperature": 0.8,
        "prompts": ["The king", "My lord,", "Once upon a time"],
        "top_k": 50,
        "seed": 0,
        "dtype": "float32",
        "extrapolation.context_lengths": [64, 128, 256, 512],
        "extrapolation.same_tokens": None,
        "extrapolation.stride": None,
        "extrapolation.position_buckets": [],
        "probes.lengths": [],
        "probes.kinds": ["recall", "needle", "induction", "copy"],
        "probes.sequences": 64,
        "probes.pairs": 4,
        "probes.key_tokens": 2,
        "probes.value_tokens": 2,
        "probes.depths": [0.0, 0.25, 0.5, 0.75, 1.0],
        "probes.segment_tokens": 16,
        "probes.seed": 0,
        "ablations": [],
        "tasks": [],
        "limit": None,
        "num_fewshot": None,
        "bos": False,
        "max_length": None,
        "task_seeds": [0, 1234, 1234, 1234],
        "bootstrap_iters": 1000,
        "log_samples": False,
    },
    ("sparsity", 1): {"windows": 16, "seq_len": 256, "heat_map_heads": 4, "dtype": "float32"},
    ("report", 1): {"compare_with": None},
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=4), below, max_size=4),
    max_leaves=10,
)


def shuffled(value: Any) -> Any:
    """The same value with every mapping in the opposite order."""
    if isinstance(value, dict):
        return {key: shuffled(item) for key, item in reversed(list(value.items()))}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


# ---- identity


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_defaults_are_left_out_whether_written_or_not(stage: str) -> None:
    config = STAGE_CONFIGS[stage]()
    explicit = STAGE_CONFIGS[stage].model_validate(config.model_dump(mode="json"))
    assert explicit.model_fields_set and identity(config) == identity(explicit) == {}


def test_only_what_differs_is_kept_at_any_depth() -> None:
    config = PretrainConfig(model=ModelConfig(mixer="lazy", num_layers=4), steps=200, lr=1e-3)
    assert identity(config) == {"model": {"mixer": "lazy"}, "lr": 1e-3}
    assert identity(PretrainConfig(model=ModelConfig(num_layers=4))) == {}


def test_a_pattern_is_the_same_written_as_a_list_or_held_as_a_tuple() -> None:
    typed = PretrainConfig.model_validate_json('{"model": {"mixer": "mlp", "pattern": [1, 4]}}', strict=True)
    assert canonical(identity(typed)) == '{"model":{"mixer":"mlp","pattern":[1,4]}}'
    assert identity(PretrainConfig(model=ModelConfig(pattern="uniform", qk_norm=False))) == {}


def test_how_a_stage_runs_is_not_what_it_computes() -> None:
    config = PretrainConfig(
        kernel="blockwise", checkpoint_every=1, keep_checkpoints=9, log_every=7, validate_every=3, steps=10
    )
    assert identity(config) == {"steps": 10}
    assert identity(ReportConfig(title="anything")) == {}
    assert identity(EvaluateConfig(batch_tokens=1)) == {}


def test_file_places_are_not_part_of_the_identity_but_how_they_are_read_is() -> None:
    here = TokenizeConfig(source=FilesSource(kind="files", paths=("/a/*.txt",), text_column="body"))
    there = TokenizeConfig(source=FilesSource(kind="files", paths=("/b/x.txt",), text_column="body"))
    assert identity(here) == identity(there) == {"source": {"kind": "files", "text_column": "body"}}
    loaded = TokenizeConfig(tokenizer=FileTokenizer(kind="file", path="/a/t.json"))
    assert identity(loaded) == {"tokenizer": {"kind": "file"}}
    hub = TokenizeConfig(source=HubSource(kind="hub", dataset="a/b", streaming=True, revision="main"))
    assert identity(hub) == {"source": {"kind": "hub", "dataset": "a/b"}}
    assert identity(TokenizeConfig(tokenizer=TrainTokenizer(vocab_size=300))) == {"tokenizer": {"vocab_size": 300}}


class Part(StageConfig):
    a: int = 1
    speed: int = operational(1)


class OtherPart(StageConfig):
    kind: Literal["other"] = "other"


class Whole(StageConfig):
    """A nested default that is not the default of its own class."""

    part: Part | OtherPart = Field(Part(a=5))


def test_a_nested_default_is_told_apart_from_the_default_of_its_class() -> None:
    assert identity(Whole()) == {}
    assert identity(Whole(part=Part(a=5, speed=9))) == {}
    assert identity(Whole(part=Part())) == {"part": {}}
    assert identity(Whole(part=OtherPart())) == {"part": {}}
    assert identity(Whole(part=Part(a=6))) == {"part": {"a": 6}}


def test_operational_fields_are_the_rest_with_dotted_names() -> None:
    config = TokenizeConfig(source=FilesSource(kind="files", paths=("/a",)))
    assert operational_fields(config) == {"source.paths": ("/a",), "shard_bytes": 64 * 2**20, "copy_to": None}
    for stage, model in STAGE_CONFIGS.items():
        names = {name.partition(".")[0] for name in operational_fields(model())}
        assert names <= set(model.model_fields), stage
    assert set(operational_fields(PretrainConfig())) == {
        *("validate_every", "checkpoint_every", "keep_checkpoints", "log_every", "loss_chunk_tokens", "kernel"),
        *("max_nonfinite_in_a_row", "activation_checkpointing", "keep_checkpoint_every", "async_checkpoints"),
        *("parallel", "reduction", "deterministic", "compile"),
    }


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "steps": st.integers(1, 10**6),
            "lr": st.floats(1e-6, 1.0),
            "seed": st.integers(0, 2**63 - 1),
            "dtype": st.sampled_from(["float32", "bfloat16"]),
            "log_every": st.integers(1, 100),
            "kernel": st.sampled_from(["auto", "reference"]),
            "model": st.fixed_dictionaries({}, optional={"mixer": st.sampled_from(["lazy", "standard"])}),
        },
    )
)
def test_an_identity_and_the_defaults_give_the_same_computation_back(fields: dict[str, Any]) -> None:
    config = PretrainConfig.model_validate(fields)
    again = PretrainConfig.model_validate(json.loads(canonical(identity(config))))
    plain = {"log_every": 1, "kernel": "auto"}
    assert again.model_copy(update=plain) == config.model_copy(update=plain)


# ---- canonical form


@given(JSON)
def test_the_order_of_mappings_does_not_matter_and_values_survive(value: Any) -> None:
    assert canonical(value) == canonical(shuffled(value))
    assert json.loads(canonical(value)) == value
    assert canonical(value).isascii()


def test_numbers_have_one_form_each() -> None:
    assert canonical([1, 1.0, 2e-3, 0.002, 1e16, -0.0, True]) == "[1,1.0,0.002,0.002,1e+16,0.0,true]"
    assert canonical((1, 2)) == canonical([1, 2])
    typed = [identity(PretrainConfig.model_validate_json(f'{{"weight_decay": {text}}}')) for text in ("1", "1.0")]
    assert canonical(typed[0]) == canonical(typed[1]) == '{"weight_decay":1.0}'


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        {"a": [float("-inf")]},
        {1: "a"},
        {"a": {None: 1}},
        {1, 2},
        b"bytes",
        Path("/a"),
        object(),
        PretrainConfig(),
        {"a": [ModelConfig()]},
        1 + 2j,
    ],
)
def test_what_has_no_stable_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical(value)


# ---- fingerprint


def test_every_part_of_a_recipe_changes_its_fingerprint() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"stage": "evaluate"},
        {"version": 2},
        {"config": {"lr": 1e-3}},
        {"config": {"lr": 1e-4}},
        {"config": {"model": {}}},
        {"source": {"lr": 1e-3}},
        {"inputs": {"tokenize": "0" * 64}},
        {"inputs": {"tokenize": "1" * 64}},
        {"inputs": {"corpus": "0" * 64}},
    ]
    prints = [fingerprint(**{**RECIPE, **change}) for change in changes]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 64 and set(p) <= set("0123456789abcdef") for p in prints)
    assert fingerprint(**RECIPE) == prints[0]


def test_the_quickstarts_fingerprint_is_what_it_was() -> None:
    """The recipe of the quickstart's stages, frozen: everybody's stored results hang on these.

    When this fails by accident, something entered or left the identity of a stage: undo it, or make the new field's
    default mean the old behaviour and leave it out. When the change is deliberate (a new default, another meaning),
    raise the STAGE_VERSION of the stage in its stages/*_config.py and put the new numbers here, in the same commit.
    """
    experiment = load_experiment(QUICKSTART)
    source = {"source": {"files": [{"format": "text", "sha256": "ab" * 32}]}, "tokenizer": {}}

    def frozen(stage: str, config: StageConfig, source: dict[str, Any], inputs: dict[str, str]) -> str:
        version = config.STAGE_VERSION
        return fingerprint(stage, version, identity(config), source, inputs)

    tokenize = frozen("tokenize", experiment.config(TokenizeConfig), source, {})
    lazy = frozen("pretrain", experiment.config(PretrainConfig, "lazy"), {}, {"tokenize": tokenize})
    standard = frozen("pretrain", experiment.config(PretrainConfig, "standard"), {}, {"tokenize": tokenize})
    assert (tokenize[:12], lazy[:12], standard[:12]) == ("958463a9e88a", "6924665ccd98", "2992013629a9")


@pytest.mark.parametrize(("stage", "version"), FROZEN_DEFAULTS)
def test_a_default_changes_only_together_with_the_stages_version(stage: str, version: int) -> None:
    """A default is left out of the fingerprint, so a changed one would silently reuse results of the old one.

    When this fails: undo the change, or raise STAGE_VERSION and freeze the new defaults here under the new version.
    A new field needs a default that means what was done before; add it here.
    """
    model = STAGE_CONFIGS[stage]
    defaults = flatten(model().model_dump(mode="json"))
    decisive = {key: value for key, value in defaults.items() if key not in operational_fields(model())}
    assert version == model.STAGE_VERSION
    assert decisive == FROZEN_DEFAULTS[stage, version]


def test_flatten_names_leaves_with_dots_and_keeps_empty_mappings() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}
    assert flatten({}) == {}
