"""Benchmarks: a model that knows the answers, one that knows nothing, resuming, workers, and what is left alone."""

import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from lazypipe.model.checkpoint import Checkpoint, save_checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.model.transformer import Transformer
from lazypipe.pipeline.bench.evaluate import train_tokenizer
from lazypipe.stages.contract import Interrupted
from lazypipe.stages.evaluate.benchmarks import run as benchmarks
from lazypipe.stages.evaluate.benchmarks.run import divide, evaluate_task, run_tasks
from lazypipe.stages.evaluate.benchmarks.suites import SUITES, expand
from lazypipe.stages.evaluate.config import EvaluateConfig
from tests.stages.evaluate.benchmarks.benchmark_files import DOCUMENTS, documents, write_files
from tests.stages.pretrain.toy_training import context_in

TASKS = tuple(dict.fromkeys((*expand(SUITES), "openbookqa")))
CHOICE_TASKS = [task for task in TASKS if task not in ("wikitext", "lambada_openai")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[str]]:
    return write_files(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def tokenizer_json(files: tuple[dict[str, str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(files[1], 400, path)
    return path


class Knowing(nn.Module):
    """Stands for a model: the next token of a known text has (nearly) all probability, elsewhere all have the same."""

    def __init__(self, tokenizer: Tokenizer, known: Iterable[str]) -> None:
        super().__init__()
        self.config = ModelConfig(max_seq_len=256)
        self.vocab_size = tokenizer.get_vocab_size()
        self.embedding = nn.Embedding(1, 1)
        self._next: dict[tuple[int, ...], int] = {}
        for text in known:
            ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
            self._next |= {ids[:end]: ids[end] for end in range(1, len(ids))}

    def hidden(self, tokens: Tensor) -> Tensor:
        found = torch.zeros(*tokens.shape, self.vocab_size)
        for row, ids in enumerate(tokens.tolist()):
            for position in range(len(ids)):
                following = self._next.get(tuple(ids[: position + 1]))
                if following is not None:
                    found[row, position, following] = 40.0
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def stand_in(tokenizer_json: Path, known: Iterable[str]) -> Checkpoint:
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    model: Any = Knowing(tokenizer, known)
    return Checkpoint(model, model.vocab_size, 0, tokenizer_json.parent)


def value(rows: list[dict[str, Any]], metric: str) -> float:
    return float(next(row["value"] for row in rows if row["metric"] == metric))


def test_a_model_that_knows_the_answers_scores_one_everywhere(
    files: tuple[dict[str, str], list[str]], tokenizer_json: Path
) -> None:
    paths, known = files
    config = EvaluateConfig(tasks=TASKS, task_data=paths, bootstrap_iters=10)
    oracle = stand_in(tokenizer_json, known)
    for task in CHOICE_TASKS:
        result, _ = evaluate_task(config, task, oracle, tokenizer_json)
        assert value(result["rows"], "acc") == 1.0, task
        assert result["counts"]["documents"] == DOCUMENTS
    result, _ = evaluate_task(config, "lambada_openai", oracle, tokenizer_json)
    assert value(result["rows"], "acc") == 1.0 and value(result["rows"], "perplexity") == pytest.approx(1.0)


def test_an_oracle_for_other_documents_does_not_score_one(
    files: tuple[dict[str, str], list[str]], tokenizer_json: Path
) -> None:
    config = EvaluateConfig(
        tasks=("piqa", "arc_easy"), task_data={task: files[0][task] for task in ("piqa", "arc_easy")}
    )
    stranger = stand_in(tokenizer_json, documents(seed=1)[1])
    scores = [
        value(evaluate_task(config, task, stranger, tokenizer_json)[0]["rows"], "acc_norm") for task in config.tasks
    ]
    assert min(scores) < 1.0


def test_a_uniform_model_has_the_bits_per_byte_of_its_vocabulary(
    files: tuple[dict[str, str], list[str]], tokenizer_json: Path
) -> None:
    """Every token costs log2 V bits, so bits per byte = tokens log2 V / bytes, whatever the windows."""
    config = EvaluateConfig(tasks=("wikitext",), task_data={"wikitext": files[0]["wikitext"]}, max_length=16)
    uniform = stand_in(tokenizer_json, [])
    result, _ = evaluate_task(config, "wikitext", uniform, tokenizer_json)
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    pages = [row["page"] for row in documents()[0]["wikitext"]]
    # The harness scores its detokenised text and counts the bytes and words of the original one.
    plain = [page.replace(" \n", "\n").replace("\n ", "\n") for page in _pages_with_line_ends(pages)]
    tokens = sum(len(tokenizer.encode(page).ids) for page in plain)
    originals = _pages_with_line_ends(pages)
    text_bytes = sum(len(page.encode()) for page in originals)
    bits = tokens * math.log2(uniform.model.vocab_size)
    assert value(result["rows"], "bits_per_byte") == pytest.approx(bits / text_bytes, rel=1e-6)
    words = sum(len(page.split()) + 2 for page in originals)  # the harness counts the empty ends as words
    assert value(result["rows"], "word_perplexity") == pytest.approx(2 ** (bits / words), rel=1e-5)
    assert result["counts"]["truncated"] == 0


def _pages_with_line_ends(pages: list[str]) -> list[str]:
    """A page ends where the next heading's line begins; only the last keeps its closing line break."""
    return [page.removesuffix("\n") for page in pages[:-1]] + pages[-1:]


# ---- a real model


@pytest.fixture(scope="module")
def checkpoint(tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    vocab_size = Tokenizer.from_file(str(tokenizer_json)).get_vocab_size()
    model = Transformer(
        ModelConfig(hidden_size=32, num_layers=2, num_heads=2, max_seq_len=64, mixer="lazy"), vocab_size
    )
    directory = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(directory, model, 0, tokenizer_json)
    return Checkpoint(model.eval(), vocab_size, 0, directory)


def three(files: tuple[dict[str, str], list[str]], **fields: Any) -> EvaluateConfig:
    tasks = ("piqa", "copa", "lambada_openai")
    data = {task: files[0][task] for task in tasks}
    return EvaluateConfig.model_validate({"tasks": tasks, "task_data": data, "bootstrap_iters": 50, **fields})


def test_tables_samples_and_metrics(
    files: tuple[dict[str, str], list[str]], checkpoint: Checkpoint, tokenizer_json: Path, tmp_path: Path
) -> None:
    context = context_in(tmp_path)
    outputs = run_tasks(three(files, limit=3, log_samples=True), checkpoint, tokenizer_json, context)
    rows = pq.read_table(context.output_dir / "tables" / "tasks.parquet").to_pylist()
    assert [(row["task"], row["metric"]) for row in rows] == [
        ("piqa", "acc"),
        ("piqa", "acc_norm"),
        ("copa", "acc"),
        ("lambada_openai", "perplexity"),
        ("lambada_openai", "acc"),
    ]
    assert all(row["documents"] == 3 and row["stderr"] is not None for row in rows)
    assert json.loads((context.output_dir / "tables" / "tasks.json").read_text()) == rows
    assert outputs.metrics["lambada_openai/perplexity"] == rows[3]["value"]
    assert outputs.metrics["piqa/acc_stderr"] == rows[0]["stderr"]
    samples = [json.loads(line) for line in (context.output_dir / "samples" / "piqa.jsonl").read_text().splitlines()]
    assert len(samples) == 3 and samples[0]["doc"]["goal"] == documents()[0]["piqa"][0]["goal"]


def test_mode_and_random_states_are_left_alone(
    files: tuple[dict[str, str], list[str]], checkpoint: Checkpoint, tokenizer_json: Path
) -> None:
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    checkpoint.model.train()
    try:
        evaluate_task(three(files), "piqa", checkpoint, tokenizer_json)
        assert checkpoint.model.training
    finally:
        checkpoint.model.eval()
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_interrupted_evaluation_goes_on_with_the_next_task(
    files: tuple[dict[str, str], list[str]],
    checkpoint: Checkpoint,
    tokenizer_json: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = three(files)
    whole = run_tasks(config, checkpoint, tokenizer_json, context_in(tmp_path / "whole"))
    context = context_in(tmp_path / "stopped")
    ran: list[str] = []
    original = benchmarks.evaluate_task

    def watched(config: EvaluateConfig, task: str, *rest: Any) -> Any:
        ran.append(task)
        if ran == ["piqa", "copa"] and config.limit is None:
            (context.scratch_dir / "stop").touch()
        return original(config, task, *rest)

    monkeypatch.setattr(benchmarks, "evaluate_task", watched)
    with pytest.raises(Interrupted, match="during copa"):
        run_tasks(config, checkpoint, tokenizer_json, context)
    (context.scratch_dir / "stop").unlink()
    resumed = run_tasks(config, checkpoint, tokenizer_json, context)
    assert ran == ["piqa", "copa", "copa", "lambada_openai"]
    assert resumed.metrics == whole.metrics
    # Another setting is another result: nothing that was kept is taken for it.
    ran.clear()
    run_tasks(three(files, limit=2), checkpoint, tokenizer_json, context)
    assert ran == ["piqa", "copa", "lambada_openai"]


def test_results_are_kept_by_content(
    checkpoint: Checkpoint, tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by path and time: a copied file keeps its task's result, another text of the same size and time does not."""
    ran: list[str] = []
    original = benchmarks.evaluate_task

    def watched(config: EvaluateConfig, task: str, *rest: Any) -> Any:
        ran.append(task)
        return original(config, task, *rest)

    monkeypatch.setattr(benchmarks, "evaluate_task", watched)
    (tmp_path / "copies").mkdir()
    paths = {task: Path(write_files(tmp_path / folder)[0][task]) for task, folder in (("piqa", "one"), ("copa", "one"))}
    context = context_in(tmp_path / "stage")

    def run(**fields: Any) -> list[str]:
        ran.clear()
        data = {task: str(path) for task, path in paths.items()}
        config = EvaluateConfig(tasks=tuple(paths), task_data=data, log_samples=True, **fields)
        run_tasks(config, checkpoint, tokenizer_json, context)
        return list(ran)

    assert run() == ["piqa", "copa"]
    paths = {task: path.rename(tmp_path / "copies" / path.name) for task, path in paths.items()}
    os.utime(paths["piqa"], (1, 1))
    os.utime(checkpoint.directory / "model.safetensors", (1, 1))
    assert run() == []
    times, text = paths["copa"].stat(), paths["copa"].read_text()
    letter = next(character for character in documents()[0]["copa"][0]["premise"] if character.isalpha())
    paths["copa"].write_text(text.replace(letter, "q"))
    os.utime(paths["copa"], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert paths["copa"].stat().st_size == times.st_size and run() == ["copa"]
    (context.scratch_dir / "tasks" / "piqa" / "samples.jsonl").write_text("torn")
    with pytest.warns(UserWarning, match="the kept result of piqa is damaged"):
        assert run() == ["piqa"]


def test_the_harness_runs_in_one_process_and_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "0"):
        if before is not None:
            monkeypatch.setenv("DISABLE_MULTIPROC", before)
        with benchmarks.harness_conditions(EvaluateConfig()):
            assert os.environ["DISABLE_MULTIPROC"] == "1"
        assert os.environ.get("DISABLE_MULTIPROC") == before


def test_shares_give_the_numbers_of_one_process(
    files: tuple[dict[str, str], list[str]], checkpoint: Checkpoint, tokenizer_json: Path, tmp_path: Path
) -> None:
    shares: list[Any] = []

    def mapping(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            shares.append(item)
            yield function(item)

    context = context_in(tmp_path / "spread")
    context.map_function = mapping
    spread = run_tasks(three(files, task_workers=2), checkpoint, tokenizer_json, context)
    here = run_tasks(three(files), checkpoint, tokenizer_json, context_in(tmp_path / "here"))
    assert spread.metrics == here.metrics
    assert sorted(task for share in shares for task in share.tasks) == sorted(three(files).tasks) and len(shares) == 2


def test_shares_are_balanced_by_the_size_of_their_files(tmp_path: Path) -> None:
    sizes = {"wikitext": 900, "piqa": 500, "copa": 300, "rte": 200}
    data = {}
    for task, size in sizes.items():
        data[task] = str(tmp_path / task)
        Path(data[task]).write_bytes(b"x" * size)
    config = EvaluateConfig(tasks=tuple(sizes), task_data=data, task_workers=2)
    assert divide(config, list(sizes)) == [["wikitext"], ["piqa", "copa", "rte"]]


def test_prompts_that_are_too_long_are_counted_and_said(
    files: tuple[dict[str, str], list[str]], checkpoint: Checkpoint, tokenizer_json: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="piqa: 10 of 10 prompts were longer than 12 tokens"):
        outputs = run_tasks(three(files, max_length=12), checkpoint, tokenizer_json, context_in(tmp_path))
    assert outputs.counts["piqa"]["truncated"] == 10


def test_worked_examples_never_hold_the_question_itself(files: tuple[dict[str, str], list[str]]) -> None:
    """From one local file, of a task with a test split (arc_easy) and of one without (piqa)."""
    from lazypipe.stages.evaluate.benchmarks.run import harness_conditions
    from lazypipe.stages.evaluate.benchmarks.tasks import load_task

    tasks = ("arc_easy", "piqa")
    config = EvaluateConfig(tasks=tasks, task_data={task: files[0][task] for task in tasks}, num_fewshot=DOCUMENTS - 1)
    for task in tasks:
        with harness_conditions(config):
            built = load_task(config, task)
            built.build_all_requests()
        for instance in built.instances:
            question = instance.doc["question" if task == "arc_easy" else "goal"]
            assert instance.args[0].count(question) == 1
            assert instance.args[0].count("Question:") == DOCUMENTS
