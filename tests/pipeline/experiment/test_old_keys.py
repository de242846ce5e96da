"""Files that use keys of earlier versions mean what they meant, and a hint gives the new spelling."""

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from lazypipe.pipeline import cli
from lazypipe.pipeline.experiment.schema import compose
from lazypipe.pipeline.planning.plan import build_nodes, explain
from lazypipe.stages.config import identity
from lazypipe.stages.contract import OldKeyWarning, UserError
from lazypipe.stages.evaluate.config import EvaluateConfig
from tests.pipeline.store.filled_store import SMALL, filled

DEFAULT = [64, 128, 256, 512]
SPREAD = {"context_lengths": [16, 64]}
SAME = {"extrapolation": {"lengths": [64, 32], "stride": 8, "max_tokens": 100}}


def extrapolation(evaluate: dict[str, Any], own: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the variant measures, defaults left out."""
    variant = {"mixer": "lazy"} if own is None else {"mixer": "lazy", "evaluate": own}
    experiment = compose({**SMALL, "evaluate": evaluate, "variants": {"lazy": variant}})
    asked = identity(experiment.config(EvaluateConfig, "lazy")).get("extrapolation", {})
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"context_lengths": DEFAULT}, {}),
        (SPREAD, SPREAD),
        ({"context_lengths": [16, 64, 16]}, SPREAD),
        ({"extrapolation": {"lengths": [64, 32]}}, {"context_lengths": [*DEFAULT, 32], "same_tokens": 65_536}),
        (SPREAD | SAME, {"context_lengths": [16, 64, 32], "same_tokens": 100, "stride": 8}),
        ({"extrapolation": {"lengths": [], "max_tokens": 100}}, {}),
        # an old key beside the new one comes from an override or from a file that extends a new one
        (SPREAD | {"extrapolation": {"context_lengths": [8], "same_tokens": 9}}, {**SPREAD, "same_tokens": 9}),
    ],
)
def test_old_lengths_are_read_as_they_were_meant(old: dict[str, Any], new: dict[str, Any]) -> None:
    with pytest.warns(OldKeyWarning, match="is now evaluate.extrapolation"):
        assert extrapolation(old) == new
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extrapolation({"extrapolation": new}) == new


def test_a_variants_own_old_lengths_keep_the_rest_of_the_section() -> None:
    shared = {"extrapolation": {"context_lengths": [8, 16], "same_tokens": 9}}
    with pytest.warns(OldKeyWarning, match=r"variants\.lazy\.evaluate\.context_lengths is now"):
        assert extrapolation(shared, {"context_lengths": [64]}) == {"context_lengths": [64], "same_tokens": 9}
    with pytest.warns(OldKeyWarning):
        asked = extrapolation(shared, {"extrapolation": {"lengths": [64], "max_tokens": 7}})
    assert asked == {"context_lengths": [8, 16, 64], "same_tokens": 7}


def test_values_that_were_refused_still_are() -> None:
    old: dict[str, Any]
    for old in ({"context_lengths": 8}, {"context_lengths": []}, {"extrapolation": {"lengths": 8}}):
        with (
            pytest.warns(OldKeyWarning),
            pytest.raises(UserError, match=r"^evaluate\.extrapolation\.context_lengths: "),
        ):
            extrapolation(old)
    with pytest.raises(UserError, match="stride=8 is of the tokens that every length scores; say how many with same_t"):
        extrapolation({"extrapolation": {"stride": 8}})


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("name: old\nvariants: {lazy: {mixer: lazy}}\nevaluate: {context_lengths: [16, 64]}\n")
    monkeypatch.setattr(sys, "argv", ["lazypipe", "plan", str(path), "--print", "evaluate/lazy"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        warnings.simplefilter("always")

        def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
            sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

        monkeypatch.setattr(warnings, "showwarning", show)
        cli.main()
    output = capsys.readouterr()
    assert ended.value.code == 0
    assert json.loads(output.out)["extrapolation"]["context_lengths"] == [16, 64]
    assert output.err == (
        "hint: evaluate.context_lengths is now evaluate.extrapolation.context_lengths; "
        "write evaluate: {extrapolation: {context_lengths: [16, 64]}}\n"
    )


def test_plan_says_that_an_old_recipe_used_another_key(tmp_path: Path) -> None:
    nodes = build_nodes(compose({**SMALL, "evaluate": {"extrapolation": SPREAD}}), {})
    store = filled(tmp_path, nodes, ["tokenize", "pretrain/lazy", "evaluate/lazy"])
    generation = store.entry("evaluate", nodes["evaluate/lazy"].fingerprint).path / "g0001"
    manifest = json.loads((generation / "manifest.json").read_text())
    manifest |= {"identity": {"context_lengths": [16, 64]}, "fingerprint": "0" * 64}
    (generation / "manifest.json").write_text(json.dumps(manifest))
    lines = explain(nodes["evaluate/lazy"], store)
    assert lines[0] == "evaluate.context_lengths is now evaluate.extrapolation.context_lengths, another recipe"
    assert len(lines) == 2 and re.match(r"\(compared with evaluate/", lines[1])
