"""`lazypipe variants`: every name an experiment file can use for a mixer, a baseline or a pattern."""

import json

from typer.testing import CliRunner

from lazypipe.model.mixers.registry import BASELINES, MIXERS
from lazypipe.model.pattern import PATTERNS
from lazypipe.pipeline.cli import app


def test_mixers_and_patterns_are_listed_for_people_and_programs() -> None:
    lines = CliRunner().invoke(app, ["variants"]).stdout.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == [*MIXERS, *PATTERNS, *BASELINES]
    assert max(map(len, lines)) <= 120
    assert json.loads(CliRunner().invoke(app, ["variants", "--json"]).stdout) == {
        "mixers": {name: row.summary for name, row in MIXERS.items()},
        "patterns": PATTERNS,
        "baselines": {name: row.summary for name, row in BASELINES.items()},
    }
