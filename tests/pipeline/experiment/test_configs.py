"""Every experiment file loads, plans and fits the GPUs it names by estimate; the papers' files keep their recipes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lazypipe.model.pattern import PATTERNS
from lazypipe.model.sizes import PYTHIA_VOCABULARY, SIZES
from lazypipe.pipeline.experiment.resources import WorkerResources
from lazypipe.pipeline.experiment.schema import Experiment, load_experiment, models
from lazypipe.pipeline.planning.costs import cost_rows, vocabulary
from lazypipe.pipeline.planning.fingerprint import fingerprint
from lazypipe.pipeline.planning.plan import Selection, build_nodes, decide
from lazypipe.pipeline.planning.preflight import inspect_sources
from lazypipe.pipeline.store.store import Store
from lazypipe.stages.config import identity
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.stage_row import Vocabulary
from lazypipe.stages.tokenization.config import TokenizeConfig
from tests.pipeline.tiny import write_corpus

CONFIGS = Path(__file__).parents[3] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
DECONSTRUCT = {"70m": "70M", "160m": "160M", "500m": "500M", "1.7b": "1.7B"}
GPU_GIB = 79  # what an 80 GB card has, for upper estimates


def load(name: str, *overrides: str) -> Experiment:
    return load_experiment(CONFIGS / f"{name}.yaml", overrides)


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_can_be_planned(name: str, tmp_path: Path) -> None:
    """On text that stands in for the hub, with a tokenizer trained on it."""
    corpus = write_corpus(tmp_path / "corpus")
    source = f"tokenize.source={{kind: files, paths: ['{corpus}/*.txt']}}"
    experiment = load(name, source, "tokenize.tokenizer={kind: train, vocab_size: 300}")
    assert experiment.name == name
    sources = inspect_sources(experiment, tmp_path / "output", write_cache=False)
    plan = decide(build_nodes(sources.experiment, sources.identity), Store(tmp_path / "output"), Selection())
    assert len(plan) == 2 + 3 * len(experiment.variants)
    recipes = [decision.node.fingerprint for decision in plan.values() if decision.node.stage == "pretrain"]
    assert len(set(recipes)) == len(experiment.variants)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_fit_a_gpu_of_80_gb_by_estimate(name: str) -> None:
    experiment = load(name)
    vocab = vocabulary(experiment, None)
    if getattr(experiment.config(TokenizeConfig).tokenizer, "name", "").startswith("EleutherAI/pythia"):
        vocab = Vocabulary(PYTHIA_VOCABULARY, exact=True)  # otherwise the largest of uint16, 2 GiB more at 1.7B
    rows = cost_rows(experiment, vocab)
    assert max(row["memory"]["total"] for row in rows) < GPU_GIB * 2**30
    resources = experiment.resources["pretrain"]
    assert isinstance(resources, WorkerResources)
    for variant in experiment.variants:
        training = experiment.config(PretrainConfig, variant)
        assert training.micro_batches_per_step % resources.worker_range[1] == 0


@pytest.mark.parametrize("name", DECONSTRUCT)
def test_deconstructing_attention_in_full(name: str) -> None:
    experiment = load(f"deconstruct_{name}")
    mixers = {"lazy", "mlp", "taylor", "gating", "random_qk", "text_qk", "static_qk"}
    found = {(model.mixer, model.pattern) for model in models(experiment).values()}
    assert found == {("standard", "uniform"), *((mixer, p) for mixer in mixers for p in ("uniform", "even"))}
    for variant in experiment.variants:
        training = experiment.config(PretrainConfig, variant)
        model = training.model
        shape = SIZES[DECONSTRUCT[name]].model(
            mixer=model.mixer, pattern=model.pattern, max_seq_len=2048, tie_embeddings=False
        )
        assert model == shape
        assert (training.beta1, training.beta2, training.weight_decay, training.grad_clip) == (0.9, 0.9999, 0.1, 1.0)
        assert (training.seq_len, training.tokens_per_step, training.warmup_steps) == (2048, 256 * 2048, 2000)
        billions = 45 if name == "1.7b" else 15
        assert training.steps == math.ceil(billions * 1e9 / training.tokens_per_step)
        assert training.lr == (3e-4 if name == "1.7b" else 4e-4)
        assert bool(experiment.config(EvaluateConfig, variant).ablations) == (model.pattern == "even")


@pytest.mark.parametrize(("name", "size"), [("lazy_340m", "340M"), ("lazy_760m", "760M")])
def test_lazy_attention_in_full(name: str, size: str) -> None:
    experiment = load(name)
    for mixer in ("lazy", "standard"):
        training = experiment.config(PretrainConfig, mixer)
        assert training.model == SIZES[size].model(
            mixer=mixer, max_seq_len=4096, max_bias_length=512, tie_embeddings=False
        )
        assert (training.beta1, training.beta2, training.weight_decay, training.lr) == (0.9, 0.95, 0.01, 4e-4)
        assert (training.steps, training.tokens_per_step, training.warmup_steps) == (30_720, 524_288, 1024)
        assert (training.seq_len, training.min_lr_fraction) == (4096, 0.1)


def test_the_pattern_ablation_has_every_pattern() -> None:
    built = models(load("deconstruct_patterns")).values()
    assert [model.pattern for model in built if model.mixer != "standard"] == list(PATTERNS)


def test_the_parts_of_lazy_attention_are_taken_away_one_at_a_time() -> None:
    built = models(load("lazy_ablations"))
    whole = built["lazy"].model_dump()
    changed = {
        name: {field for field, value in model.model_dump().items() if value != whole[field]}
        for name, model in built.items()
    }
    assert changed == {
        "standard": {"mixer"},
        "lazy": set(),
        "no_bias": {"lazy_bias"},
        "no_rope": {"lazy_rope"},
        "no_elastic": {"lazy_elastic"},
        "tau_per_layer": {"lazy_tau_scope"},
        "constant_threshold": {"lazy_threshold", "tau_init"},
    }


def test_seeds_repeat_the_close_models_of_the_quick_experiment() -> None:
    quick, seeds = load("deconstruct_quick"), load("deconstruct_seeds")

    def recipes(experiment: Experiment, seed: int) -> dict[str, str]:
        return {
            name.removesuffix(f"_seed{seed}"): fingerprint("pretrain", 1, identity(training), {}, {})
            for name in experiment.variants
            if (training := experiment.config(PretrainConfig, name)).seed == seed
        }

    assert recipes(seeds, 0) == recipes(quick, 0)
    assert len({seeds.config(PretrainConfig, name).seed for name in seeds.variants}) == 3
    for seed in (1, 2):
        names = recipes(seeds, seed)
        assert names.keys() == set(quick.variants) - {"mlp", "gating"}
        for name in names:
            repeated = f"{name}_seed{seed}"
            training = seeds.config(PretrainConfig, repeated)
            assert training.model_copy(update={"seed": 0}) == quick.config(PretrainConfig, name)
            assert seeds.config(EvaluateConfig, repeated) == quick.config(EvaluateConfig, name)
