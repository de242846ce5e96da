"""Names, files and fields of benchmarks: what is read, what is refused and how it is said."""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lazypipe.stages.contract import UserError, file_sha256
from lazypipe.stages.data import hub
from lazypipe.stages.evaluate.benchmarks.suites import SUITES, expand
from lazypipe.stages.evaluate.benchmarks.task_files import FIELDS, read_rows, wikitext_pages
from lazypipe.stages.evaluate.benchmarks.tasks import (
    FILES,
    definition,
    hub_dataset,
    load_task,
    pin_tasks,
    scan,
    tasks_folder,
    tasks_identity,
)
from lazypipe.stages.evaluate.config import EvaluateConfig


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}


# ---- names


def test_every_known_task_is_where_we_say_and_the_harness_agrees() -> None:
    names = scan(tasks_folder())
    assert len(names) > 10_000
    for task, file in FILES.items():
        assert names[task] == ("task", tasks_folder() / file)
        assert definition(task) == tasks_folder() / file
    assert set(expand(SUITES)) <= FILES.keys() & FIELDS.keys()
    assert names["mmlu"][0] == "group" and names["squadv2"][0] == "class"


def test_the_suites_of_the_papers() -> None:
    assert len(SUITES["lazy9"]) == len(SUITES["deconstruct9"]) == 9
    assert expand(["lazy9", "piqa", "copa"]) == (*SUITES["lazy9"], "copa")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("hellaswagg", "no task 'hellaswagg'; did you mean 'hellaswag'"),
        ("lazy8", "did you mean 'lazy9'"),
        ("LAZY9", "no task 'LAZY9'; did you mean 'lazy9'"),
        ("0", "no task '0'. The suites are lazy9, deconstruct9"),
        ("mmlu", "'mmlu' is a group of tasks; name its tasks one by one"),
        ("squadv2", "'squadv2' is written in Python"),
    ],
)
def test_names_that_cannot_be_run_are_refused(task: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        definition(task)


def test_tasks_outside_the_suites_and_their_datasets() -> None:
    assert definition("mmlu_anatomy").name == "mmlu_anatomy.yaml"
    assert hub_dataset(definition("mmlu_anatomy")) == "cais/mmlu"  # from the file it includes
    assert hub_dataset(definition("arc_challenge")) == "allenai/ai2_arc"


def test_without_the_harness_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(
        UserError, match=r"needs lm-evaluation-harness.*pip install -c constraints.txt -e \"\.\[eval\]\""
    ):
        tasks_identity(EvaluateConfig(tasks=("piqa",)), None)
    assert tasks_identity(EvaluateConfig(), None) == {}


def test_data_for_a_task_that_is_not_run_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"task_data names 'boolq', which tasks=\['deconstruct8'\]"):
        EvaluateConfig(tasks=("deconstruct8",), task_data={"boolq": "x.jsonl"})
    EvaluateConfig(tasks=("lazy9",), task_data={"boolq": "x.jsonl"})


def test_a_single_resample_is_refused() -> None:
    with pytest.raises(ValidationError, match="bootstrap_iters=1: one resample has no standard deviation"):
        EvaluateConfig(bootstrap_iters=1)
    assert EvaluateConfig(bootstrap_iters=0).bootstrap_iters == 0


# ---- what enters the recipe


def test_contents_enter_the_recipe_and_paths_do_not(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one.jsonl", PIQA), written(tmp_path / "two.jsonl", PIQA)
    other = written(tmp_path / "other.jsonl", {**PIQA, "label": 0})

    def identity(files: Any) -> dict[str, Any]:
        return tasks_identity(EvaluateConfig(tasks=("piqa",), task_data={"piqa": files}), tmp_path / "cache")

    assert identity(str(one)) == identity(str(two)) == {"tasks": {"piqa": {"evaluated": file_sha256(one)}}}
    assert identity(str(one)) != identity(str(other))
    assert identity({"validation": str(one), "train": str(other)})["tasks"]["piqa"].keys() == {"validation", "train"}


def test_hub_datasets_are_pinned_to_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def resolve(kind: str, name: str, revision: str | None) -> str:  # noqa: ARG001
        asked.append((name, revision))
        return "c" * 40

    monkeypatch.setattr(hub, "resolve_commit", resolve)
    config = pin_tasks(EvaluateConfig(tasks=("piqa", "rte"), task_revisions={"rte": "v2"}))
    assert asked == [("baber/piqa", None), ("nyu-mll/glue", "v2")]
    assert tasks_identity(config, None) == {"tasks": {"piqa": "c" * 40, "rte": "c" * 40}}
    loaded: dict[str, Any] = {}

    def load_dataset(**arguments: Any) -> Any:
        loaded.update(arguments)
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"piqa could not be loaded from the hub \(baber/piqa\): ConnectionError.*PATH"):
        load_task(config, "piqa")
    assert loaded == {"path": "baber/piqa", "name": None, "revision": "c" * 40}


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"piqa has no file in evaluate.task_data.*baber/piqa.*task_data: \{piqa: PATH\}"
    ):
        pin_tasks(EvaluateConfig(tasks=("piqa",)))


# ---- files


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("piqa.csv", b"a,b", "unknown file type; known endings are .json, "),
        ("empty.jsonl", b"\n", "is empty"),
        ("empty.json", b"[]", "is empty"),
        ("list.jsonl", b"[1, 2]\n", "row 1 is not an object"),
        ("broken.jsonl", b'{"goal": \n', "cannot be read as jsonl"),
        ("broken.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("broken.jsonl.gz", b"no gzip", "not an intact gzip file|cannot be read"),
        ("lacks.jsonl", json.dumps({**PIQA, "sol2": None}).encode(), "row 1 is no document of piqa: expected text"),
        ("label.jsonl", json.dumps({**PIQA, "label": 7}).encode(), "expected a label among 0, 1"),
        ("half.jsonl", json.dumps({**PIQA, "label": 0.5}).encode(), "expected a label among 0, 1 .* found 0.5"),
        ("infinite.jsonl", json.dumps({**PIQA, "label": float("inf")}).encode(), "expected a label .* found inf"),
        ("choice.jsonl", json.dumps({**PIQA, "sol1": ""}).encode(), "row 1 is no document of piqa: a choice is empty"),
        ("lines.json", (json.dumps(PIQA) + "\n").encode() * 2, "one object a line is .jsonl: rename it"),
        ("latin.jsonl", json.dumps(PIQA).encode().replace(b"g", b"\xff", 1), "cannot be read as jsonl: 'utf-8' codec"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name(
    name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    config = EvaluateConfig(tasks=("piqa",), task_data={"piqa": str(path)})
    with pytest.raises(UserError, match=said) as refused:
        tasks_identity(config, None)
        read_rows(path, "piqa")
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_without_rows_is_refused_when_planned(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "none.json").write_text("[]")
    pq.write_table(pa.table({"goal": pa.array([], pa.string())}), tmp_path / "none.parquet")
    for name in ("none.json", "none.parquet"):
        with pytest.raises(UserError, match=f"{name}' is empty"):
            tasks_identity(EvaluateConfig(tasks=("piqa",), task_data={"piqa": str(tmp_path / name)}), None)


SWAG = {"activity_label": "a", "ctx_a": "x", "ctx_b": "y", "endings": ["p", "q", "r", "s"], "label": 3}
ARC = {"question": "q", "choices": {"text": ["p", "q"], "label": ["A", "B"]}, "answerKey": "B"}
SIQA = {"context": "c", "question": "q", "answerA": "p", "answerB": "q", "answerC": "r"}


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("hellaswag", {**SWAG, "endings": ["p", "q", "r"]}, "expected a label among 0, 1, 2 or 0 ... 2, found 3"),
        ("hellaswag", {**SWAG, "endings": "pqrs"}, "expected a list of endings, found 'pqrs'"),
        ("hellaswag", {**SWAG, "endings": ["p", "", "r", "s"]}, "a choice is empty"),
        ("arc_easy", {**ARC, "choices": {"text": ["p", "q", "r"], "label": ["A", "B"]}}, "expected a label of its own"),
        ("arc_easy", {**ARC, "choices": {"text": ["p", "q"], "label": ["B", "B"]}}, "expected a label of its own"),
        ("social_iqa", {**SIQA, "correct": ""}, "expected the label 1, 2 or 3 .* found ''"),
        ("social_iqa", {**SIQA, "correct": "BC"}, "expected the label 1, 2 or 3 .* found 'BC'"),
        ("rte", {"premise": "p", "hypothesis": "h", "label": "neutral"}, "among entailment, .* found 'neutral'"),
        ("lambada_openai", {"text": "ends in a space "}, "after a space, its last word, found 'ends in a space '"),
        ("lambada_openai", {"text": "word"}, "after a space, its last word"),
        ("wikitext", {"page": " \n"}, "the page is blank"),
    ],
)
def test_rows_that_would_give_wrong_numbers_are_refused(task: str, row: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"row 1 is no document of {task}: .*{said}"):
        read_rows(written(tmp_path / "rows.jsonl", row), task)


def test_a_missing_column_is_named_with_what_is_there(tmp_path: Path) -> None:
    without = {key: value for key, value in PIQA.items() if key != "sol2"}
    path = written(tmp_path / "piqa.jsonl", PIQA, without)
    config = EvaluateConfig(tasks=("piqa",), task_data={"piqa": str(path)})
    with pytest.raises(
        UserError, match=r"row 2 lacks 'sol2'; it has goal, sol1, label, and piqa needs goal, sol1, sol2"
    ):
        tasks_identity(config, None)


def test_a_task_without_known_fields_is_checked_when_it_is_built(tmp_path: Path) -> None:
    path = written(tmp_path / "anatomy.jsonl", {"question": "q", "choices": ["a", "b", "c", "d"]})
    config = EvaluateConfig(tasks=("mmlu_anatomy",), task_data={"mmlu_anatomy": str(path)})
    with pytest.raises(UserError, match=r"anatomy.jsonl does not fit the harness's task"):
        load_task(config, "mmlu_anatomy")
    written(path, {"question": "q", "choices": ["a", "b", "c", "d"], "subject": "anatomy", "answer": 2})
    assert len(load_task(config, "mmlu_anatomy").eval_docs) == 1
    written(path, {"question": "q"}, {"question": "q", "answer": 1})
    with pytest.raises(UserError, match="row 2: 'answer' is in this row and not in row 1"):
        load_task(config, "mmlu_anatomy")


# ---- the fields of the original files


@pytest.mark.parametrize(
    ("task", "original", "expected"),
    [
        ("boolq", {"passage": "p", "question": "q", "answer": True}, {"passage": "p", "question": "q", "label": 1}),
        ("boolq", {"passage": "p", "question": "q", "label": 0}, {"passage": "p", "question": "q", "label": 0}),
        (
            "rte",
            {"premise": "p", "hypothesis": "h", "label": "not_entailment"},
            {"sentence1": "p", "sentence2": "h", "label": 1},
        ),
        ("lambada_openai", {"context": "a b ", "continuation": " c"}, {"text": "a b c"}),
        (
            "arc_easy",
            {
                "question": {"stem": "s", "choices": [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]},
                "answerKey": "2",
            },
            {"question": "s", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        ),
        (
            "openbookqa",
            {
                "question": {"stem": "s", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
                "answerKey": "B",
            },
            {"question_stem": "s", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        ),
        (
            "social_iqa",
            {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "correct": "C"},
            {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        ),
        (
            "winogrande",
            {"qID": "1", "sentence": "_ won", "option1": "A", "option2": "B", "answer": 2},
            {"sentence": "_ won", "option1": "A", "option2": "B", "answer": "2"},
        ),
    ],
)
def test_original_fields_become_the_harness_s(
    task: str, original: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    assert read_rows(written(tmp_path / "file.jsonl", original), task) == [expected]
    (tmp_path / "file.json").write_text(json.dumps([original]), encoding="utf-8")
    (tmp_path / "file.jsonl.gz").write_bytes(gzip.compress(json.dumps(original).encode()))
    assert read_rows(tmp_path / "file.json", task) == read_rows(tmp_path / "file.jsonl.gz", task) == [expected]


def test_wikitext_pages_begin_at_headings_of_the_first_order() -> None:
    text = " \n = One = \n \n Text . \n \n = = Section = = \n \n More . \n = Two = \n \n End . \n"
    assert [row["page"] for row in wikitext_pages(text)] == [
        " = One = \n \n Text . \n \n = = Section = = \n \n More . ",
        " = Two = \n \n End . \n",
    ]


def test_few_shot_examples_come_from_the_train_split(tmp_path: Path) -> None:
    asked = written(tmp_path / "asked.jsonl", PIQA)
    shown = written(tmp_path / "shown.jsonl", {**PIQA, "goal": "shown"})
    files = {"validation": str(asked), "train": str(shown)}
    config = EvaluateConfig.model_validate({"tasks": ["piqa"], "task_data": {"piqa": files}, "num_fewshot": 1})
    built = load_task(config, "piqa")
    built.build_all_requests()
    assert built.instances[0].args[0] == "Question: shown\nAnswer: b\n\nQuestion: g\nAnswer:"
    too_many = EvaluateConfig(tasks=("piqa",), task_data={"piqa": str(asked)}, num_fewshot=1)
    with pytest.raises(UserError, match="num_fewshot=1: the files of piqa hold 1 documents"):
        load_task(too_many, "piqa")
    only_train = EvaluateConfig.model_validate({"tasks": ["piqa"], "task_data": {"piqa": {"train": str(shown)}}})
    with pytest.raises(UserError, match="has a train split alone"):
        load_task(only_train, "piqa")
