"""A tokenization that was killed, stopped or damaged goes on from its finished units, to the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from lazypipe.stages.contract import Context, Interrupted, Outputs
from lazypipe.stages.facts import UnitFacts
from lazypipe.stages.kept_work import keep, kept, sweep_unfinished
from lazypipe.stages.tokenization.config import TokenizeConfig
from lazypipe.stages.tokenization.stage import run

WORDS = [
    "the",
    "winter",
    "of",
    "our",
    "discontent",
    "made",
    "glorious",
    "summer",
    "by",
    "this",
    "sun",
    "of",
    "York",
    "and",
    "all",
    "clouds",
    "that",
]
# The stage in a process of its own, its units in two more.
PROGRAM = """
import sys
from pathlib import Path
from lazypipe.pipeline.execution.execute import map_in_processes
from lazypipe.stages.contract import Context
from lazypipe.stages.tokenization.stage import run
from lazypipe.stages.tokenization.config import TokenizeConfig
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    config = TokenizeConfig.model_validate_json(sys.argv[2])
    context = Context(folder / "output", folder / "scratch", map_function=map_in_processes(2))
    context.output_dir.mkdir(), context.scratch_dir.mkdir()
    run(config, {}, context)
"""


def write_corpus(folder: Path, documents: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 150)) + f" {number}\n" for number in range(documents)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"kind": "files", "paths": [str(folder / "a.jsonl")]}


def config_of(source: dict[str, Any], shard_bytes: int) -> TokenizeConfig:
    return TokenizeConfig(source=source, tokenizer={"kind": "train", "vocab_size": 300}, shard_bytes=shard_bytes)


def tokenize(config: TokenizeConfig, folder: Path, attempt: str = "output", **context: Any) -> tuple[Outputs, Path]:
    made = Context(folder / attempt, folder / "scratch", **context)
    made.output_dir.mkdir(parents=True)
    made.scratch_dir.mkdir(exist_ok=True)
    return run(config, {}, made), made.output_dir


def content(output: Path) -> dict[str, bytes]:
    return {str(file.relative_to(output)): file.read_bytes() for file in sorted(output.rglob("*")) if file.is_file()}


def units_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("scratch/tokenization/units/unit-*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizeConfig, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = config_of(write_corpus(folder, 4000), shard_bytes=2**17)
    return config, tokenize(config, folder)[1]


@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_killed_outright_in_the_middle_of_encoding(tmp_path, undisturbed, victim):
    config, whole = undisturbed
    folder = tmp_path / "killed"
    folder.mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = str(Path(__file__).parents[3])
    command = [sys.executable, str(program), str(folder), config.model_dump_json()]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(units_in(folder)) < 3:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in family if "spawn_main" in " ".join(child.cmdline())]
    os.kill(process.pid if victim == "driver" else workers[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0, "it was over before it was killed"
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    kept_units = len(units_in(folder))

    outputs, output = tokenize(config, folder, "second")
    units = outputs.facts.to_json()["units"]
    assert 3 <= kept_units < units["total"], errors.decode()
    assert units["encoded_before"] == kept_units == outputs.metrics["units_resumed"]
    assert units["read_before"] == units["total"]
    assert units["tokenizer_before"]
    assert content(output) == content(whole)
    assert not list(folder.rglob(".*")), "what was half-written is gone"


def stopping_after(folder: Path, phase: str, units: int) -> Any:
    """A map that asks the stage to stop once some units of a phase are done."""

    def mapping(function: Any, items: Iterable[Any]) -> Iterator[Any]:
        for done, item in enumerate(items):
            if function.__name__ == phase and done == units:
                (folder / "scratch/stop").touch()
            yield function(item)

    return mapping


@pytest.mark.parametrize(("phase", "said"), [("scan_unit", "units are read"), ("encode_unit", "units are encoded")])
def test_stopped_it_says_what_is_kept_and_goes_on_from_there(tmp_path, phase, said):
    config = config_of(write_corpus(tmp_path, 60), shard_bytes=8192)
    expected, whole = tokenize(config, tmp_path / "whole")
    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted, match=rf"stopped: 3 of 6 {said}.*the next run goes on from there"):
        tokenize(config, folder, "first", map_function=stopping_after(folder, phase, 2))
    (folder / "scratch/stop").unlink()
    outputs, output = tokenize(config, folder, "second")
    encoding = phase == "encode_unit"
    assert outputs.facts.to_json()["units"] == {
        "total": 6,
        "read_before": 6 if encoding else 3,
        "encoded_before": 3 if encoding else 0,
        "tokenizer_before": encoding,
    }
    assert content(output) == content(whole)
    assert replace(outputs.facts, units=None) == replace(expected.facts, units=None)


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "warning", "unharmed"),
    [
        ("units/unit-000002/train-00000.arrow", "does not match its sha256.*encoded again", "read_before"),
        ("scans/unit-000001/documents.npz", "does not match its sha256.*read again", "encoded_before"),
        ("tokenizer/trained/tokenizer.json", "does not match its sha256.*trained again", "encoded_before"),
        ("units/unit-000002/manifest.json", r"manifest.json.*encoded again", "read_before"),
    ],
)
def test_damaged_work_is_done_again_with_a_warning(tmp_path, name, warning, unharmed):
    config = config_of(write_corpus(tmp_path, 60), shard_bytes=8192)
    _, output = tokenize(config, tmp_path)
    expected = content(output)
    file = tmp_path / "scratch/tokenization" / name
    damage(file) if file.suffix != ".json" or "trained" in name else file.write_text("{")
    with pytest.warns(UserWarning, match=warning):
        outputs, again = tokenize(config, tmp_path, "again")
    assert content(again) == expected
    assert outputs.facts.to_json()["units"][unharmed] == 6


def test_work_for_another_recipe_or_text_is_not_taken_up(tmp_path):
    source = write_corpus(tmp_path, 60)
    tokenize(config_of(source, 8192), tmp_path, "one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other, _ = tokenize(config_of(source, 8192).model_copy(update={"validation_fraction": 0.3}), tmp_path, "two")
        assert other.facts.units == UnitFacts(6, read_before=6, encoded_before=0, tokenizer_before=False)
        text = (tmp_path / "a.jsonl").read_text()
        (tmp_path / "a.jsonl").write_text(text.replace("York", "Cork", 1))
        changed, _ = tokenize(config_of(source, 8192), tmp_path, "three")
    assert changed.facts.units.read_before == 0  # all units are of that one file
    assert changed.facts.units.encoded_before == 0


def test_a_folder_is_kept_whole_or_not_at_all(tmp_path):
    def fails(directory: Path) -> dict[str, Any]:
        (directory / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path / "work", "key", fails)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".work.1.ab").mkdir()
    sweep_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []

    def writes(directory: Path) -> dict[str, Any]:
        (directory / "file").write_text("all")
        return {"n": 1}

    keep(tmp_path / "work", "key", writes)
    assert kept(tmp_path / "work", "key").facts == {"n": 1}
    assert kept(tmp_path / "work", "other") == kept(tmp_path / "absent", "key")
    (tmp_path / "work/file").unlink()
    problem = kept(tmp_path / "work", "key").problem
    assert problem is not None and problem.endswith("file is missing")
