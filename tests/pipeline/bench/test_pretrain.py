"""The training benchmark: the same training on all sides, a table and JSON."""

import json
from pathlib import Path

import pytest

from lazypipe.pipeline.bench import pretrain as pretrain_bench
from lazypipe.pipeline.bench.pretrain import main
from lazypipe.pipeline.bench.pretrain_loops import bare_loop
from lazypipe.stages.contract import UserError

TINY = ["--turns", "2", "--steps", "2", "--hidden-size", "32", "--num-layers", "1", "--num-heads", "2"]
TINY += ["--seq-len", "16", "--tokens-per-step", "64", "--micro-batch-size", "2", "--vocab-size", "61"]


def test_all_loops_train_the_same_and_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--mixer", "lazy", "--clock", "cpu", "--json", str(tmp_path / "rows.json")]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["mixer"] for row in found["rows"]] == ["lazy"]
    assert {"torch", "transformers", "accelerate", "python"} == found["versions"].keys()
    for row in found["rows"]:
        assert (row["turns"], row["steps_per_turn"]) == (2, 2)
        assert row["tokens_per_s"].keys() == {"ours", "bare", "trainer"}
        assert row["largest_loss_difference"] == 0  # not nearly the same training: the same
        assert all(
            0 < numbers["low"] <= numbers["median"] <= numbers["high"] for numbers in row["ratio_of_ours"].values()
        )
        assert 0 < row["data_wait"] < 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "ours / bare (95 %)" in lines[0] and lines[1].startswith("lazy")


def test_loops_that_train_different_things_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bare_loop

    def other(config: object, *arguments: object) -> object:
        return honest(config.model_copy(update={"seed": 5}), *arguments)  # type: ignore[attr-defined, arg-type]

    monkeypatch.setattr(pretrain_bench, "bare_loop", other)
    with pytest.raises(RuntimeError, match="the loops train different things"):
        main([*TINY, "--no-trainer"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--turns", "0"], "--turns 0: must be at least 1"),
        (["--json", "/nowhere/rows.json"], "/nowhere is no folder"),
        (["--mixer", "attention"], "--mixer attention"),
        (["--tokens-per-step", "65"], "tokens_per_step=65 is not a multiple"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([*TINY, *arguments])
