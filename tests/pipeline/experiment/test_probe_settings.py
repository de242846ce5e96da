"""Length extrapolation and probes in an experiment file: off by default, refused before anything runs."""

from pathlib import Path

import pytest

from lazypipe.pipeline.experiment.schema import compose, load_experiment
from lazypipe.pipeline.planning.plan import Selection, decide
from lazypipe.pipeline.planning.preflight import check_lengths
from lazypipe.pipeline.store.store import Store
from lazypipe.stages.config import identity
from lazypipe.stages.contract import UserError
from lazypipe.stages.evaluate.config import EvaluateConfig
from lazypipe.stages.overrides import apply_overrides
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.tokenization.config import TokenizeConfig
from tests.pipeline.store.filled_store import SMALL, commit, nodes_of


def test_what_is_off_is_not_in_the_recipe() -> None:
    assert identity(EvaluateConfig()) == {}
    assert EvaluateConfig().window_lengths() == [
        ("evaluate.extrapolation.context_lengths", length) for length in (64, 128, 256, 512)
    ]
    on = EvaluateConfig.model_validate(
        {"extrapolation": {"context_lengths": [64], "same_tokens": 9, "stride": 8}, "probes": {"lengths": [32]}}
    )
    assert identity(on) == {
        "extrapolation": {"context_lengths": (64,), "same_tokens": 9, "stride": 8},
        "probes": {"lengths": (32,)},
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evaluate.probes={lengths: [65]}",
            r"probes\.lengths of variants\.side: 65 tokens .* max_seq_len=64",
        ),
        (
            "evaluate.extrapolation={context_lengths: [32, 80]}",
            r"extrapolation\.context_lengths of variants\.side: 80 tokens",
        ),
        ("evaluate.probes={lengths: [15]}", r"evaluate\.probes: lengths=\[15\]: 15 is too short for recall"),
        ("evaluate.probes={lenghts: [64]}", "evaluate.probes.lenghts: unknown key; did you mean 'lengths'"),
        ("evaluate.probes={lengths: [64], kinds: [needel]}", "evaluate.probes.kinds.0: must be 'recall', 'needle'"),
        ("evaluate.probes={lengths: [64], depths: [2]}", "evaluate.probes.depths.0: must be less than or equal to 1"),
        (
            "evaluate.extrapolation={context_lengths: [64, 64]}",
            r"extrapolation: context_lengths=\[64, 64\] names something twice",
        ),
        ("evaluate.extrapolation={same_tokens: 9, stride: 0}", "evaluate.extrapolation.stride: must be greater than 0"),
        (
            "evaluate.extrapolation={same_tokens: 9, position_buckets: [4, 2]}",
            r"extrapolation: position_buckets=\[4, 2\] does",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(override: str, message: str) -> None:
    evaluate = {"extrapolation": {"context_lengths": [16]}}
    variants = {"side": {"mixer": "random_qk"}}
    document = {**SMALL, "evaluate": evaluate, "sparsity": {"seq_len": 64}, "variants": variants}
    with pytest.raises(UserError, match=message):
        compose(apply_overrides(document, [override]))


def test_a_length_beyond_the_validation_split_is_refused_before_training(tmp_path: Path) -> None:
    nodes = nodes_of(evaluate={"probes": {"lengths": [64, 2_000_000]}})
    store = Store(tmp_path)
    corpus = commit(store, nodes, "tokenize")
    with pytest.raises(UserError, match=r"evaluate/lazy: evaluate\.probes\.lengths=2000000 needs 2000001 tokens"):
        check_lengths(decide(nodes, store, Selection()), corpus)


def test_the_example_builds_on_the_quickstart_and_trains_nothing_new() -> None:
    configs = Path(__file__).parents[3] / "configs"
    quickstart, probing = (load_experiment(configs / f"{name}.yaml") for name in ("quickstart", "probes"))
    for name in quickstart.variants:
        assert probing.config(PretrainConfig, name) == quickstart.config(PretrainConfig, name)
        assert probing.config(EvaluateConfig, name).extrapolation.context_lengths[-1] == 2048
    assert probing.config(TokenizeConfig) == quickstart.config(TokenizeConfig)
