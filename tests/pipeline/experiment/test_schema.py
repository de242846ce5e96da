"""The experiment file: its defaults, its variants, and the sentence each mistake gets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from lazypipe.model.config import ModelConfig
from lazypipe.pipeline.experiment.resources import StageResources, WorkerResources, resources_model
from lazypipe.pipeline.experiment.schema import (
    MODEL_FIELDS,
    Experiment,
    Storage,
    compose,
    flat_fields,
    load_experiment,
    local_files,
    resolve_root,
    section_names,
)
from lazypipe.stages.contract import UserError
from lazypipe.stages.data.sources import FilesSource
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.registry import STAGE_CONFIGS, STAGES
from lazypipe.stages.report.config import ReportConfig
from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.tokenization.config import TokenizeConfig

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"hidden_size": 32, "num_heads": 2, "max_seq_len": 64},
    "pretrain": {"steps": 3, "seq_len": 32, "tokens_per_step": 64, "micro_batch_size": 2},
    "variants": {"lazy": {"mixer": "lazy"}, "standard": {}},
}


def small(**sections: Any) -> Experiment:
    return compose({**SMALL, **sections})


# ---- what an experiment means


def test_the_quickstart_means_what_it_says() -> None:
    experiment = load_experiment(QUICKSTART)
    assert experiment.name == experiment.config(ReportConfig).title == "quickstart"
    assert list(experiment.variants) == ["lazy", "standard"]
    lazy, standard = (experiment.config(PretrainConfig, name) for name in experiment.variants)
    assert (lazy.model.mixer, lazy.model.max_bias_length) == ("lazy", 128)
    assert (standard.model.mixer, standard.model.max_bias_length) == ("standard", 512)
    assert lazy.model_copy(update={"model": standard.model}) == standard
    for stage in ("evaluate", "sparsity"):
        assert experiment.configs[f"{stage}/lazy"] == experiment.configs[f"{stage}/standard"]
    assert (lazy.steps, lazy.lr, lazy.micro_batches_per_step) == (200, 2e-3, 2)
    resources = experiment.resources["pretrain"]
    assert isinstance(resources, WorkerResources) and resources.in_task


def test_every_section_but_name_and_variants_may_be_left_out_or_empty() -> None:
    bare = compose({"name": "x", "variants": {"a": None}})
    sections: dict[str, Any] = dict.fromkeys(section_names())
    empty = compose({**sections, "name": "x", "seed": 0, "variants": {"a": {}}})
    assert bare.configs == empty.configs and bare.config(TokenizeConfig) == TokenizeConfig()


def test_flat_keys_of_a_variant_go_to_the_model_or_to_pretraining() -> None:
    variants = {"a": {"num_heads": 4, "lr": 1e-3, "evaluate": {"temperature": 0.5}}, "b": {}}
    experiment = small(variants=variants, evaluate={"top_k": 5})
    a, b = (experiment.config(PretrainConfig, name) for name in "ab")
    assert (a.model.num_heads, a.lr, b.model.num_heads, b.lr) == (4, 1e-3, 2, 2e-3)
    one, other = (experiment.config(EvaluateConfig, name) for name in "ab")
    assert (one.temperature, one.top_k, other.temperature, other.top_k) == (0.5, 5, 0.8, 5)


def test_a_key_of_two_sections_reaches_only_the_one_it_is_written_in() -> None:
    experiment = small(sparsity={"seq_len": 64}, variants={"a": {"dtype": "bfloat16"}})
    training, evaluation = experiment.config(PretrainConfig, "a"), experiment.config(EvaluateConfig, "a")
    analysis = experiment.config(SparsityConfig, "a")
    assert (training.seq_len, analysis.seq_len) == (32, 64)
    assert (training.dtype, evaluation.dtype, analysis.dtype) == ("bfloat16", "float32", "float32")


def seeds_of(experiment: Experiment, variant: str) -> tuple[int, int]:
    """(of training, of evaluation)"""
    return experiment.config(PretrainConfig, variant).seed, experiment.config(EvaluateConfig, variant).seed


def test_seeds_come_from_the_experiment_unless_set_nearer() -> None:
    variants = {"a": {}, "b": {"seed": 8, "evaluate": {"seed": 9}}}
    experiment = small(seed=5, variants=variants)
    assert {name: seeds_of(experiment, name) for name in experiment.variants} == {"a": (5, 5), "b": (8, 9)}
    experiment = small(seed=5, pretrain={**SMALL["pretrain"], "seed": 6}, evaluate={"seed": 7})
    assert seeds_of(experiment, "lazy") == (6, 7)


def test_ablations_of_the_section_reach_the_hybrids_only() -> None:
    half: dict[str, Any] = {"mixer": "lazy", "pattern": [1]}
    variants = {"lazy": {"mixer": "lazy"}, "standard": {"pattern": "even"}, "half": half}
    experiment = small(evaluate={"ablations": ["skip"]}, variants=variants)
    asked = {name: experiment.config(EvaluateConfig, name).ablations for name in experiment.variants}
    assert asked == {"lazy": (), "standard": (), "half": ("skip",)}
    assert small(variants={"half": {**half, "evaluate": {"ablations": ["skip"]}}}).variants
    with pytest.raises(
        UserError, match=r"variants.lazy.evaluate.ablations: \['skip'\] takes out .* is lazy; they are for hybrids"
    ):
        small(variants={"lazy": {"mixer": "lazy", "evaluate": {"ablations": ["skip"]}}})
    with pytest.raises(UserError, match=r"variants.lazy.evaluate.ablations: must be a list"):
        small(variants={"lazy": {"mixer": "lazy", "evaluate": {"ablations": "skip"}}})


def test_model_pretrain_and_evaluate_names_are_disjoint() -> None:
    flat = [MODEL_FIELDS, *(flat_fields(row) for row in STAGES if row.in_variant == "flat")]
    assert len(flat) == 2 and sum(map(len, flat)) == len(frozenset().union(*flat))
    assert not frozenset().union(*flat) & {"model", *STAGE_CONFIGS}


def test_every_field_of_every_config_says_what_it_is() -> None:
    sections = (Storage, resources_model(STAGES), StageResources, WorkerResources)
    models: list[type[BaseModel]] = [*STAGE_CONFIGS.values(), ModelConfig, *sections]
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_paths_become_absolute_and_keep_their_globs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    tokenize = {
        "source": {"kind": "files", "paths": ["a/*.txt", "../b.txt", "~/c.txt", "/d.txt"]},
        "tokenizer": {"kind": "file", "path": "t.json"},
    }
    experiment = small(tokenize=tokenize)
    assert local_files(experiment) == [
        str(tmp_path / "a" / "*.txt"),
        str(tmp_path.parent / "b.txt"),
        "/home/somebody/c.txt",
        "/d.txt",
        str(tmp_path / "t.json"),
    ]
    monkeypatch.chdir("/")
    again = compose(experiment.document)
    corpus = again.config(TokenizeConfig)
    assert isinstance(corpus.source, FilesSource) and corpus == experiment.config(TokenizeConfig)


def test_hub_names_that_are_directories_or_can_only_be_paths_become_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "some" / "corpus").mkdir(parents=True)

    def hub(dataset: str, name: str) -> Experiment:
        return small(
            tokenize={"source": {"kind": "hub", "dataset": dataset}, "tokenizer": {"kind": "hub", "name": name}}
        )

    def names(experiment: Experiment) -> tuple[str, str]:
        parts = experiment.document["tokenize"]
        assert experiment.configs == compose(experiment.document).configs
        return parts["source"]["dataset"], parts["tokenizer"]["name"]

    local = hub("some/corpus", "../elsewhere")
    assert names(local) == (str(tmp_path / "some" / "corpus"), str(tmp_path.parent / "elsewhere"))
    assert local_files(local) == list(names(local))
    assert names(hub("~/corpus", "./t")) == ("/home/somebody/corpus", str(tmp_path / "t"))
    remote = hub("some/dataset", "gpt2")
    assert names(remote) == ("some/dataset", "gpt2") and local_files(remote) == []
    with pytest.raises(UserError, match=r"tokenize\.source\.dataset: must have at least 1 character"):
        hub("", "gpt2")


def test_composing_leaves_its_argument_alone_and_its_document_composes_to_the_same() -> None:
    before = json.dumps(SMALL)
    experiment = compose(SMALL)
    assert json.dumps(SMALL) == before
    assert compose(experiment.document) == experiment


def test_the_root_is_chosen_in_the_documented_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LAZYPIPE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    experiment = small(storage={"root": "from_yaml"})
    assert resolve_root(None, None) == tmp_path / "output"
    assert resolve_root(experiment, None) == tmp_path / "from_yaml"
    assert resolve_root(experiment, "from_option") == tmp_path / "from_option"
    monkeypatch.setenv("LAZYPIPE_HOME", str(tmp_path / "from_environment"))
    assert resolve_root(experiment, "from_option") == tmp_path / "from_environment"
    monkeypatch.delenv("LAZYPIPE_HOME")
    with pytest.raises(UserError, match="choose another with --root"):
        resolve_root(None, "~there_is_no_such_user/x")


# ---- what is refused


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("tokenise.x=1", "tokenise: unknown section; did you mean 'tokenize'?"),
        ("pretrain.lrr=1", "pretrain.lrr: unknown key; did you mean 'lr'?"),
        ("model.hiden_size=1", "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ("tokenize.source={kind: files, path: [a]}", "tokenize.source.path: unknown key; did you mean 'paths'?"),
        ("resources.pretran.cpus=1", "resources.pretran: unknown key; did you mean 'pretrain'?"),
        ("resources.pretrain.gpus=1", "resources.pretrain.gpus: unknown key; did you mean 'cpus'?"),
        ("sparsity.window=3", "sparsity.window: unknown key; did you mean 'windows'?"),
        ("variants.lazy.hiden_size=64", "variants.lazy.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ("variants.lazy.windows=64", "variants.lazy.windows: unknown key"),
        ("variants.lazy.evaluate={temprature: 1}", "variants.lazy.evaluate.temprature: unknown key; did you mean"),
        ("pretrain.steps=0", "pretrain.steps: must be greater than 0, found 0"),
        ("pretrain.steps=1.5", "pretrain.steps: must be a valid integer, found 1.5"),
        ("pretrain.steps='200'", "pretrain.steps: must be a valid integer, found '200'"),
        ("pretrain.steps=true", "pretrain.steps: must be a valid integer, found True"),
        ("pretrain.lr=fast", "pretrain.lr: must be a valid number, found 'fast'"),
        ("pretrain.lr=", "pretrain.lr: must be a valid number, found None"),
        ("pretrain.lr=.nan", "pretrain.lr: must be a finite number, found nan"),
        ("pretrain.lr=1e400", "pretrain.lr: must be a finite number, found inf"),
        ("pretrain.dtype=fp16", "pretrain.dtype: must be 'float32' or 'bfloat16', found 'fp16'"),
        ("pretrain.kernel=cuda", "pretrain.kernel: must be 'auto', 'reference', 'blockwise' or 'triton', found 'cuda'"),
        ("pretrain=[1]", "pretrain: expected a mapping, found [1]"),
        ("pretrain.model={num_heads: 2}", "pretrain.model: the model has its own section; move these fields to"),
        ("pretrain.tokens_per_step=65", "pretrain: tokens_per_step=65 is not a multiple of micro_batch_size * seq_len"),
        ("pretrain.seq_len=128", "pretrain: tokens_per_step=64 is not a multiple"),
        ("variants.lazy={seq_len: 128, tokens_per_step: 256}", "variants.lazy.seq_len: seq_len=128 is above"),
        ("variants.lazy.max_seq_len=16", "variants.lazy.max_seq_len: seq_len=32 is above model.max_seq_len=16; raise"),
        ("model.num_heads=3", "model: num_heads=3 does not divide hidden_size=32; choose a divisor"),
        ("variants.lazy.num_heads=3", "variants.lazy.num_heads: num_heads=3 does not divide hidden_size=32; choose"),
        ("model.num_heads=32", "model: head_dim=1 (hidden_size/num_heads) is odd; RoPE rotates pairs"),
        ("variants.lazy.num_kv_heads=3", "variants.lazy.num_kv_heads: num_kv_heads=3 does not divide num_heads=2"),
        (
            "variants.lazy.mixer=lasy",
            "variants.lazy.mixer: there is no mixer 'lasy'; did you mean 'lazy'? (known: standard, lazy, mlp",
        ),
        ("variants.lazy.pattern=evn", "variants.lazy.pattern: must be one of uniform, even, odd, top, middle, bottom"),
        ("model.pattern=[0, 1]", "model: pattern=[0, 1] names layer 0; layers count from 1 to num_layers=4"),
        (
            "variants.lazy={pattern: 25%, num_layers: 3}",
            "num_layers: pattern=25% keeps no layer of num_layers=3",
        ),
        (
            "variants.lazy={mixer: random_qk, evaluate: {extrapolation: {context_lengths: [64, 65]}}}",
            "evaluate.extrapolation.context_lengths of variants.lazy: 65 tokens are more than max_seq_len=64",
        ),
        (
            "variants.lazy={mixer: text_qk, evaluate: {extrapolation: {context_lengths: [64]}}}",
            "sparsity.seq_len of variants.lazy: 256 tokens are more than max_seq_len=64, where the side sequence",
        ),
        ("variants.lazy.seed=-1", "variants.lazy.seed: must be greater than or equal to 0, found -1"),
        ("variants.lazy.evaluate.seed=x", "variants.lazy.evaluate.seed: must be a valid integer, found 'x'"),
        ("variants.lazy.evaluate={prompts: [1]}", "variants.lazy.evaluate.prompts.0: must be a valid string, found 1"),
        ("variants.lazy.evaluate=3", "variants.lazy.evaluate: expected a mapping, found 3"),
        ("variants.lazy=3", "variants.lazy: expected a mapping of model and pretrain fields, found 3"),
        ("variants={Lazy: {}}", "variants: 'Lazy' is not a variant's name; use a-z, 0-9 and _"),
        ("variants={'': {}}", "variants: '' is not a variant's name"),
        ("variants={}", "variants: at least one is needed, for example"),
        ("~variants", "variants: at least one is needed, for example"),
        ("variants=[lazy]", "variants: expected a mapping, found ['lazy']"),
        ("name=a b", "name: expected letters, digits, '.', '_' or '-', such as 'quickstart', found 'a b'"),
        ("~name", "name: expected letters, digits, '.', '_' or '-', such as 'quickstart', found None"),
        ("name=../x", "name: expected letters"),
        ("seed=-1", "seed: expected a non-negative integer, found -1"),
        ("seed=true", "seed: expected a non-negative integer, found True"),
        ("storage.root=''", "storage.root: must have at least 1 character, found ''"),
        (
            "evaluate.extrapolation.context_lengths=[]",
            "evaluate.extrapolation.context_lengths: must have at least 1 item, found []",
        ),
        (
            "evaluate.extrapolation.context_lengths=64",
            "evaluate.extrapolation.context_lengths: must be a list, found 64",
        ),
        (
            "evaluate.extrapolation.context_lengths=[64, a]",
            "evaluate.extrapolation.context_lengths.1: must be a valid integer, found 'a'",
        ),
        (
            "evaluate.extrapolation.context_lengths=[64, 0]",
            "evaluate.extrapolation.context_lengths.1: must be greater than 0, found 0",
        ),
        (
            "variants.lazy.evaluate.extrapolation.context_lengths=[0]",
            "variants.lazy.evaluate.extrapolation.context_lengths.0: must be greater than 0, found 0",
        ),
        ("tokenize.validation_fraction=1", "tokenize.validation_fraction: must be less than 1, found 1"),
        ("tokenize.source=embedded", "tokenize.source: must be a mapping, found 'embedded'"),
        ("tokenize.source={kind: fils}", "tokenize.source.kind: 'fils' is not one of 'embedded', 'files', 'hub'"),
        ("tokenize.source={paths: [a]}", "kind: is required and missing; choose one of 'embedded', 'files', 'hub'"),
        ("tokenize.source={kind: files}", "tokenize.source.paths: is required and missing"),
        ("tokenize.source={kind: files, paths: '*'}", "tokenize.source.paths: expected a list, found '*'; write [*]"),
        ("tokenize.source={kind: files, paths: []}", "tokenize.source.paths: must have at least 1 item, found []"),
        ("tokenize.source={kind: files, paths: [a, 1]}", "tokenize.source.paths.1: must be a valid string, found 1"),
        ("tokenize.source={kind: hub, dataset: ''}", "tokenize.source.dataset: must have at least 1 character"),
        ("tokenize.tokenizer={kind: file, path: ''}", "tokenize.tokenizer.path: must have at least 1 character"),
        ("tokenize.tokenizer={}", "tokenize.tokenizer.kind: is required and missing; choose one of 'train', 'file'"),
        ("tokenize.tokenizer={kind: train, vocab_size: 9}", "tokenize.tokenizer.vocab_size: must be greater than or"),
        (
            "tokenize.tokenizer={kind: train, vocab_size: 70000}",
            "tokenizer.vocab_size=70000 does not fit token_dtype=uint16 (at most 65536); set token_dtype: uint32",
        ),
        ("resources.pretrain.workers=0", "resources.pretrain.workers: must be greater than 0, found 0"),
        ("resources.pretrain=2", "resources.pretrain: must be a mapping, found 2"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    with pytest.raises(UserError) as refusal:
        load_experiment(path, [override])
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "pydantic" not in str(refusal.value)


def test_a_root_that_is_a_file_or_below_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "output"
    file.write_text("text")
    for root in (file, file / "below"):
        with pytest.raises(UserError, match=r"the root '.*' is not a directory: .*output is a file.*--root"):
            resolve_root(None, str(root))
    assert resolve_root(None, str(tmp_path / "new" / "root")) == tmp_path / "new" / "root"


def test_several_mistakes_are_counted() -> None:
    with pytest.raises(UserError, match=r"pretrain\.steps: .* \(and 1 more\)"):
        small(pretrain={**SMALL["pretrain"], "steps": 0, "lr": "x"})


def test_relative_and_empty_paths_do_not_turn_into_the_working_directory() -> None:
    with pytest.raises(UserError):
        small(tokenize={"tokenizer": {"kind": "file", "path": ""}})
    experiment = small(tokenize={"source": {"kind": "files", "paths": ["./x/../y.txt"]}})
    assert local_files(experiment) == [os.path.join(os.getcwd(), "y.txt")]  # noqa: PTH109, PTH118


KEYS = st.sampled_from(
    sorted(
        {
            *section_names(),
            *MODEL_FIELDS,
            *(field for config in STAGE_CONFIGS.values() for field in config.model_fields),
        }
        | {"lazy", "kind", "paths", "path", "cpus", "workers", "windows", "root", "vocab_size", "nonsense", "", "ü"}
    )
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.floats()
    | st.sampled_from(["embedded", "files", "file", "hub", "train", "lazy", "a", "", "float32", "*.txt", "\0"]),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(tree=st.dictionaries(KEYS, VALUES, max_size=5), section=st.sampled_from(section_names()), value=VALUES)
def test_compose_returns_an_experiment_or_a_refusal(tree: dict[str, Any], section: str, value: Any) -> None:
    for document in (tree, {**SMALL, section: value}):
        try:
            assert compose(document).variants
        except UserError as refusal:
            assert "\n" not in str(refusal)


@settings(max_examples=80, deadline=None)
@given(
    variant=st.dictionaries(KEYS, VALUES, max_size=4),
    source=st.fixed_dictionaries({"kind": st.sampled_from(["embedded", "files", "hub"])}, optional={"paths": VALUES}),
)
def test_so_it_does_with_variants_and_sources(variant: dict[str, Any], source: dict[str, Any]) -> None:
    for document in ({**SMALL, "variants": {"a": variant}}, {**SMALL, "tokenize": {"source": source}}):
        try:
            assert compose(document).variants
        except UserError as refusal:
            assert "\n" not in str(refusal)
