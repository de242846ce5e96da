"""`lazypipe plan` and `variants --sizes`: numbers of the models, whatever is known of the corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lazypipe.model.costs import training_flops_per_token
from lazypipe.model.sizes import SIZES
from lazypipe.pipeline.cli import app
from lazypipe.pipeline.experiment.schema import compose, models
from lazypipe.pipeline.planning.costs import cost_rows
from lazypipe.stages.contract import UserError
from lazypipe.stages.stage_row import Vocabulary
from lazypipe.stages.tokenization.config import HubTokenizer, TokenizeConfig
from lazypipe.stages.tokenization.planning import vocabulary
from tests.pipeline.tiny import write_experiment
from tests.test_imports import loaded_by

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 32},
    "pretrain": {"steps": 3, "seq_len": 32, "tokens_per_step": 64, "micro_batch_size": 2},
    "variants": {"lazy": {"mixer": "lazy", "max_bias_length": 16}, "standard": {}, "untied": {"tie_embeddings": False}},
}


def invoked(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def test_the_plan_says_what_every_variant_costs(tmp_path: Path) -> None:
    config = write_experiment(tmp_path)
    text = invoked("plan", config).stdout
    (line,) = [line for line in text.splitlines() if line.startswith("lazy  ")]
    costs = {row["variant"]: row for row in json.loads(invoked("plan", config, "--json").stdout)["costs"]}
    lazy, standard = costs["lazy"], costs["standard"]
    assert line.split()[1:4] == [f"{lazy['parameters']:,}", f"{lazy['non_embedding_parameters']:,}", "+68"]
    assert lazy["parameters"] - standard["parameters"] == lazy["difference"] == 2 * 2 * (16 + 1)
    assert lazy["parameters"] - lazy["non_embedding_parameters"] == 300 * 32
    assert lazy["vocabulary"] == {"size": 300, "exact": True}
    assert lazy["memory"]["total"] == sum(value for key, value in lazy["memory"].items() if key != "total")


def test_costs_of_small_models_by_hand() -> None:
    rows = {row["variant"]: row for row in cost_rows(compose(SMALL), Vocabulary(50, exact=True))}
    assert rows["standard"]["parameters"] == 50 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 96 + 2 * 32) + 32
    assert rows["untied"]["difference"] == 50 * 32 and rows["standard"]["difference"] == 0
    per_layer = 2 * (4 * 32 * 32 + 3 * 32 * 96) + 4 * 32 * 32
    assert rows["standard"]["training_flops_per_token"] == 3 * (2 * per_layer + 2 * 50 * 32)
    assert rows["standard"]["training_tokens"] == 192
    model = models(compose(SMALL))["lazy"]
    assert rows["lazy"]["training_flops_per_token"] == training_flops_per_token(model, 50, 32, 2)


def test_a_baseline_is_said_to_be_estimated_by_its_standard_model(tmp_path: Path) -> None:
    config = write_experiment(tmp_path)
    assert "that a baseline is matched to" not in invoked("plan", config).stdout
    gpus = ("resources.pretrain={gpus_per_worker: 1}", "resources.evaluate={gpus: 1}")
    text = invoked("plan", config, "variants.other={mixer: gla}", *gpus).stdout
    assert "other: the numbers of the standard model that a baseline is matched to, not its own" in text


def test_an_unknown_vocabulary_bounds_or_hides_what_depends_on_it(tmp_path: Path) -> None:
    hub = TokenizeConfig(tokenizer=HubTokenizer(kind="hub", name="a/b"))
    assert vocabulary(hub) == Vocabulary(65_536, exact=False)
    wide = hub.model_copy(update={"token_dtype": "uint32"})
    assert vocabulary(wide) is None
    unknown = {row["variant"]: row for row in cost_rows(compose(SMALL), None)}
    assert unknown["lazy"]["parameters"] is None and unknown["lazy"]["memory"] is None
    assert (unknown["lazy"]["difference"], unknown["untied"]["difference"]) == (2 * 2 * (16 + 1), None)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2}]}))
    given = {"source": {"kind": "embedded"}, "tokenizer": {"kind": "file", "path": str(tokenizer)}}
    assert vocabulary(TokenizeConfig.model_validate(given)) == Vocabulary(3, exact=True)


def test_a_hub_out_of_reach_does_not_hide_the_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> str:
        raise UserError("no network")

    monkeypatch.setattr("lazypipe.stages.data.hub.resolve_commit", unreachable)
    config = write_experiment(tmp_path)
    result = invoked("plan", config, "tokenize={source: {kind: hub, dataset: a/b}, tokenizer: {kind: hub, name: a/b}}")
    assert isinstance(result.exception, UserError) and "<=" in result.stdout and "65,536 tokens" in result.stdout


def test_sizes_are_printed_for_people_and_programs() -> None:
    lines = invoked("variants", "--sizes").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(SIZES)
    assert lines[3].split()[-4:] == ["390,900,608", "435,972,992", "481,045,376", "172,368"]
    rows = json.loads(invoked("variants", "--sizes", "--json").stdout)
    assert [row["size"] for row in rows] == list(SIZES) and rows[0]["untied"] == 76_683_776


def test_planning_with_costs_loads_no_torch() -> None:
    assert loaded_by("import lazypipe.pipeline.planning.costs, model.sizes", {"torch", "numpy", "ray", "mlflow"}) == []
