"""The committed loss curves are met on any CPU, and `loss_compare` finds a change of a single bit's worth."""

import copy
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import loss_compare
from tests.loss_compare import MIXERS, REFERENCE, STEPS, Curves, curves, first_difference

PROJECT = Path(__file__).parents[1]
# Other vector widths, math libraries and thread counts, and weights 1e-7 off, moved these losses by 5e-7 at most. The
# kernels of lazy may also decide a tie between a weight and its threshold otherwise, which switches that entry's
# gradient: the reference backend in place of the blockwise one moved lazy by 2.9e-5.
BOUNDS = {"standard": 1e-4, "lazy": 3e-4}


@pytest.fixture(scope="module")
def ours() -> Curves:
    return curves()


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_meets_the_committed_curve(ours: Curves, mixer: str) -> None:
    """After a deliberate change: python tests/loss_compare.py --write, and say in the commit why."""
    expected = json.loads(REFERENCE.read_text(encoding="utf-8"))[mixer]
    found, bound = ours[mixer], BOUNDS[mixer]
    assert expected["loss"][0] - expected["loss"][-1] > 1.0  # a curve that falls, so that there is something to miss
    assert len(found["loss"]) == STEPS
    assert found["loss"] == pytest.approx(expected["loss"], rel=0, abs=bound)
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=0, abs=bound)


def test_the_first_differing_step_is_named(ours: Curves) -> None:
    assert first_difference(ours, copy.deepcopy(ours)) is None
    other = copy.deepcopy(ours)
    other["lazy"]["grad_norm"][6] *= 1 + 2**-40
    other["lazy"]["loss"][9] += 1
    assert str(first_difference(ours, other)).startswith("lazy: step 7: grad_norm ")
    other = copy.deepcopy(ours)
    other["standard"]["weights"] = "0"
    assert str(first_difference(ours, other)).startswith("standard: after 30 steps: weights ")


def test_another_commit_is_trained_from_its_own_tree(
    ours: Curves, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository of two commits, the second with another AdamW epsilon: the first step it can show in is the second.

    Its newest commit is taken for this tree (`ours`): a third process would only repeat it.
    """
    repository = tmp_path / "repository"
    for package in ("kernels", "model", "stages"):
        shutil.copytree(PROJECT / package, repository / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "lazypipe", repository / "lazypipe", symlinks=True)
    optimizer = repository / "stages" / "pretrain" / "optimizer.py"
    text = optimizer.read_text(encoding="utf-8")
    assert "eps=config.adam_eps" in text
    optimizer.write_text(text.replace("eps=config.adam_eps", "eps=2 * config.adam_eps"), encoding="utf-8")

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "core.hooksPath=/dev/null")
        subprocess.run(["git", "-C", str(repository), *identity, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "other epsilon")
    optimizer.write_text(text, encoding="utf-8")
    git("commit", "--quiet", "-a", "-m", "ours")
    in_processes = loss_compare.curves_of
    monkeypatch.setattr(loss_compare, "curves_of", lambda tree: ours if tree == repository else in_processes(tree))
    assert loss_compare.compare(repository, "HEAD~1") == 1
    assert "differs from HEAD~1 (" in (found := capsys.readouterr().out)
    assert "standard: step 2: loss " in found
    listed = subprocess.run(
        ["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(listed.stdout.splitlines()) == 1
    monkeypatch.setattr(loss_compare, "curves_of", lambda _: ours)
    assert loss_compare.compare(repository, "HEAD") == 0
    assert "bitwise equal to HEAD" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        loss_compare.compare(repository, "nothing")
    assert refused.value.code == 2
