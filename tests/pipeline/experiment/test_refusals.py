"""Bad input: one clear error, exit code 2, nothing written."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest

from tests.pipeline.tiny import lazypipe, write_experiment

SOURCE = "tokenize.source={{kind: files, paths: ['{folder}/{name}']}}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["pretrain.lrr=1"], "did you mean 'lr'?"),
        (["variants.lazy.mixer=lasy"], "variants.lazy.mixer"),
        (["model.num_heads=3"], "num_heads=3 does not divide hidden_size=32"),
        (["pretrain.steps=0"], "pretrain.steps"),
        (["tokenize.tokenizer.vocab_size=70000"], "does not fit token_dtype=uint16"),
        (["resources.pretrain.gpus_per_worker=8"], "8 GPU"),
        ([SOURCE.format(folder="{tmp}", name="absent.txt")], "absent.txt"),
        ([SOURCE.format(folder="{tmp}", name="empty.txt")], "empty"),
        ([SOURCE.format(folder="{tmp}", name="torn.jsonl.gz")], "torn.jsonl.gz"),
        ([SOURCE.format(folder="{tmp}", name="other.parquet")], "text"),
        (
            ["evaluate.extrapolation.context_lengths=[16,4000]"],
            "evaluate.extrapolation.context_lengths=4000 needs 4001 tokens",
        ),
        (["sparsity.seq_len=100000"], "100001 are needed"),
        (["resources.pretrain.workers=2", "--local"], "--local trains in one process"),
        (["--root", "{tmp}/empty.txt"], "empty.txt is a file"),
        (["--only", "tokenize", "--force", "pretrain/lazy"], "--only tokenize leaves out"),
        (["--only", "evaluat/lazy"], "did you mean 'evaluate/lazy'?"),
    ],
)
def test_a_refusal_names_the_problem_before_any_compute(tmp_path: Path, overrides: list[str], expected: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a king"}\n' * 500)[:-20])
    pq.write_table(pa.table({"body": ["a king"]}), tmp_path / "other.parquet")
    config = write_experiment(tmp_path)
    result = lazypipe("run", config, *(o.replace("{tmp}", str(tmp_path)) for o in overrides))
    assert result.returncode == 2, result.stdout + result.stderr
    assert expected in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "output").glob("store/pretrain/*/g*"))


def test_an_unreachable_tracking_server_is_refused_within_seconds(tmp_path: Path) -> None:
    config = write_experiment(tmp_path)
    result = lazypipe("run", config, timeout=15, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert result.returncode == 2 and "http://127.0.0.1:9 is unreachable" in result.stderr
    assert not (tmp_path / "output" / "store").exists()


def test_a_damaged_tracking_database_is_refused(tmp_path: Path) -> None:
    config = write_experiment(tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mlflow.db").write_text("garbage")
    result = lazypipe("run", config, "--local")
    assert result.returncode == 2 and "is not a SQLite database" in result.stderr
    absent = lazypipe("rerun", "abcdef", "--root", tmp_path / "nowhere")
    assert absent.returncode == 2 and "nothing was ever logged" in absent.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    from lazypipe.pipeline.execution.run import make_plan
    from lazypipe.pipeline.experiment.schema import load_experiment
    from lazypipe.pipeline.planning.plan import Selection
    from lazypipe.pipeline.planning.preflight import check_disk
    from lazypipe.stages.contract import UserError

    experiment = load_experiment(write_experiment(tmp_path))
    plan, corpus_bytes = make_plan(experiment, tmp_path / "output", Selection(), full_check=False)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(UserError, match=r"not enough disk space below .*pretrain/lazy .* MiB.*1 MiB free"):
        check_disk(plan, tmp_path / "output", corpus_bytes)
