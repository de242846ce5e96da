"""Local benchmark files: their rows, in the fields the harness's own task reads.

The harness reads each benchmark as the hub has it. The files its authors published often name the fields differently
(ARC nests its choices, BoolQ says answer: true, SuperGLUE's RTE says premise), so every task of the suites has a
function that takes either. A row that lacks a field is refused by file, row and field, before any model is loaded.
Imports only the standard library, so that planning stays instant; Parquet files need pyarrow.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazypipe.stages.contract import UserError, first_line
from lazypipe.stages.data.source_files import SourceFile, file_facts

Row = dict[str, Any]

ENDINGS: dict[str, tuple[str, bool]] = {  # file name ending -> (how it is read, gzip)
    ".json": ("json", False),
    ".json.gz": ("json", True),
    ".jsonl": ("jsonl", False),
    ".jsonl.gz": ("jsonl", True),
    ".parquet": ("parquet", False),
}
PAGES = {".txt": ("pages", False), ".raw": ("pages", False), ".tokens": ("pages", False)}  # wikitext only
ROWS_CHECKED = 16  # while planning; the rest when the task is built


# ---- the fields of each task


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def _choice(value: Any) -> str:
    """Text of a choice. The harness divides by its length."""
    if not _text(value):
        raise ValueError("a choice is empty")
    return str(value)


def _label(value: Any, names: tuple[str, ...]) -> int:
    """The number of a label that is written as its number, as text, or as true or false."""
    if isinstance(value, str):
        value = names.index(value) if value in names else int(value) if value.isdecimal() else value
    if not isinstance(value, (int, float)) or value not in range(len(names)):
        raise ValueError(f"expected a label among {', '.join(names)} or 0 ... {len(names) - 1}, found {value!r}")
    return int(value)


def _piqa(row: Row) -> Row:
    found = {"goal": _text(row["goal"]), "sol1": _choice(row["sol1"]), "sol2": _choice(row["sol2"])}
    return {**found, "label": _label(row["label"], ("0", "1"))}


def _hellaswag(row: Row) -> Row:
    found = {name: _text(row[name]) for name in ("activity_label", "ctx_a", "ctx_b")}
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) < 2:
        raise ValueError(f"expected a list of endings, found {endings!r}")
    label = _label(row["label"], tuple(str(number) for number in range(len(endings))))
    return {**found, "endings": [_choice(ending) for ending in endings], "label": str(label)}


def _winogrande(row: Row) -> Row:
    sentence = _text(row["sentence"])
    if "_" not in sentence:
        raise ValueError(f"the sentence has no blank '_': {sentence!r}")
    answer = str(row["answer"])
    if answer not in ("1", "2"):
        raise ValueError(f"expected the answer 1 or 2, found {row['answer']!r}")
    return {"sentence": sentence, "option1": _text(row["option1"]), "option2": _text(row["option2"]), "answer": answer}


def _choices(row: Row) -> Row:
    """{"text": [...], "label": [...]}, from that or from the list of {"text", "label"} that AI2 published."""
    choices = row["choices"]
    if isinstance(choices, Mapping):
        texts, labels = list(choices["text"]), list(choices["label"])
    else:
        texts, labels = [choice["text"] for choice in choices], [choice["label"] for choice in choices]
    labels = [str(label) for label in labels]
    if len(texts) != len(labels) or len(texts) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"expected a label of its own for each of two choices or more, found {labels} for {texts}")
    return {"text": [_choice(text) for text in texts], "label": labels}


def _answered(row: Row, choices: Row) -> str:
    answer = str(row["answerKey"]).strip()
    if answer not in choices["label"]:
        raise ValueError(f"answerKey {answer!r} is none of the labels {choices['label']}")
    return answer


def _arc(row: Row) -> Row:
    question = row["question"]
    nested = question if isinstance(question, Mapping) else {"stem": question, "choices": row["choices"]}
    choices = _choices({"choices": nested["choices"]})
    return {"question": _text(nested["stem"]), "choices": choices, "answerKey": _answered(row, choices)}


def _openbookqa(row: Row) -> Row:
    if isinstance(row.get("question"), Mapping):
        stem, choices = row["question"]["stem"], _choices({"choices": row["question"]["choices"]})
    else:
        stem, choices = row["question_stem"], _choices(row)
    return {"question_stem": _text(stem), "choices": choices, "answerKey": _answered(row, choices)}


def _social_iqa(row: Row) -> Row:
    label = str(row["label"] if "label" in row or "correct" not in row else row["correct"])
    if label not in ("1", "2", "3", "A", "B", "C"):
        raise ValueError(f"expected the label 1, 2 or 3 (or correct: A, B or C), found {label!r}")
    found = {name: _text(row[name]) for name in ("context", "question")}
    found |= {name: _choice(row[name]) for name in ("answerA", "answerB", "answerC")}
    return {**found, "label": str("ABC".index(label) + 1) if label in "ABC" else label}


def _boolq(row: Row) -> Row:
    label = row["label"] if "label" in row or "answer" not in row else row["answer"]
    found = {"passage": _text(row["passage"]), "question": _text(row["question"])}
    return {**found, "label": _label(label, ("no", "yes"))}


def _copa(row: Row) -> Row:
    if row["question"] not in ("cause", "effect"):
        raise ValueError(f"expected the question 'cause' or 'effect', found {row['question']!r}")
    found = {"premise": _text(row["premise"]), "question": row["question"]}
    found |= {name: _choice(row[name]) for name in ("choice1", "choice2")}
    return {**found, "label": _label(row["label"], ("0", "1"))}


def _sciq(row: Row) -> Row:
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    found = {name: _text(row[name]) for name in ("question", "support")}
    return found | {name: _choice(row[name]) for name in names}


def _rte(row: Row) -> Row:
    of_super_glue = "sentence1" not in row and "premise" in row
    one, two = ("premise", "hypothesis") if of_super_glue else ("sentence1", "sentence2")
    label = _label(row["label"], ("entailment", "not_entailment"))
    return {"sentence1": _text(row[one]), "sentence2": _text(row[two]), "label": label}


def _lambada(row: Row) -> Row:
    if "text" not in row and "continuation" in row:
        text = f"{_text(row['context']).rstrip()} {_text(row['continuation']).strip()}"
    else:
        text = _text(row["text"])
    # The harness asks for what follows the last space, whatever that is.
    if not all(text.rpartition(" ")[::2]):
        raise ValueError(f"expected some text and, after a space, its last word, found {text[-60:]!r}")
    return {"text": text}


def _wikitext(row: Row) -> Row:
    if not _text(row["page"]).strip():
        raise ValueError("the page is blank")
    return {"page": row["page"]}


@dataclass(frozen=True)
class Fields:
    """expected: the fields as an error names them. convert: a row of a file -> what the harness's task reads."""

    expected: str
    convert: Callable[[Row], Row]


FIELDS: dict[str, Fields] = {
    "piqa": Fields("goal, sol1, sol2, label", _piqa),
    "hellaswag": Fields("activity_label, ctx_a, ctx_b, endings, label", _hellaswag),
    "winogrande": Fields("sentence, option1, option2, answer", _winogrande),
    "arc_easy": Fields("question, choices, answerKey", _arc),
    "arc_challenge": Fields("question, choices, answerKey", _arc),
    "openbookqa": Fields("question_stem, choices, answerKey", _openbookqa),
    "social_iqa": Fields("context, question, answerA, answerB, answerC, label", _social_iqa),
    "boolq": Fields("passage, question, label (or answer)", _boolq),
    "copa": Fields("premise, question, choice1, choice2, label", _copa),
    "sciq": Fields("question, support, distractor1, distractor2, distractor3, correct_answer", _sciq),
    "rte": Fields("sentence1, sentence2 (or premise, hypothesis), label", _rte),
    "lambada_openai": Fields("text", _lambada),
    "lambada_standard": Fields("text", _lambada),
    "wikitext": Fields("page", _wikitext),
}


# ---- files


def task_file(path: Path, task: str) -> SourceFile:
    """A file that can be read for `task`, or a UserError that says why not."""
    key = f"evaluate.task_data.{task}"
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist or is no regular file"
        raise UserError(f"{key}: {str(path)!r} {what}; name a file")
    found = _how(path, task)
    if found is None:
        known = [*ENDINGS, *(PAGES if task == "wikitext" else ())]
        raise UserError(f"{key}: {str(path)!r} has an unknown file type; known endings are {', '.join(known)}")
    return SourceFile(path, "parquet" if found[0] == "parquet" else "text", found[1])


def _how(path: Path, task: str) -> tuple[str, bool] | None:
    endings = {**ENDINGS, **(PAGES if task == "wikitext" else {})}
    for ending in sorted(endings, key=len, reverse=True):
        if path.name.lower().endswith(ending):
            return endings[ending]
    return None


def check_file(path: Path, task: str, cache_dir: Path | None) -> str:
    """The sha256 (hex) of a task's file, after a look at its first rows; a UserError when it cannot be used."""
    facts = next(iter(file_facts([task_file(path, task)], cache_dir)))
    if facts.blank or not list(itertools.islice(_rows(path, task), ROWS_CHECKED)):
        raise UserError(
            f"evaluate.task_data.{task}: {str(path)!r} is empty; give a file that holds the task's documents"
        )
    return facts.sha256


def read_rows(path: Path, task: str) -> list[Row]:
    """Every row of a file in the harness's fields, all with the same ones. UserError for the first wrong one."""
    task_file(path, task)
    rows = list(_rows(path, task))
    if not rows:
        raise UserError(
            f"evaluate.task_data.{task}: {str(path)!r} is empty; give a file that holds the task's documents"
        )
    for number, row in enumerate(rows, start=1):
        if row.keys() != rows[0].keys():
            wrong = sorted(row.keys() ^ rows[0].keys())[0]
            raise UserError(
                f"evaluate.task_data.{task}: {str(path)!r}, row {number}: {wrong!r} is "
                f"{'missing' if wrong in rows[0] else 'in this row and not in row 1'}; every row needs the same fields"
            )
    return rows


def _rows(path: Path, task: str) -> Iterator[Row]:
    fields = FIELDS.get(task)
    for number, row in enumerate(_raw_rows(path, task), start=1):
        where = f"evaluate.task_data.{task}: {str(path)!r}, row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where} is not an object but {str(row)[:60]!r}; expected one object per document")
        if fields is None:
            yield row
            continue
        try:
            yield fields.convert(row)
        except KeyError as missing:
            raise UserError(
                f"{where} lacks {missing.args[0]!r}; it has {', '.join(map(str, row)) or 'nothing'}, and {task} needs "
                f"{fields.expected}"
            ) from None
        except (TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{where} is no document of {task}: {first_line(error)}; it needs {fields.expected}"
            ) from None


def _raw_rows(path: Path, task: str) -> Iterator[Any]:
    how = _how(path, task)
    assert how is not None, "task_file has accepted it"
    kind, zipped = how
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches(batch_size=256):
                    yield from batch.to_pylist()
        elif kind == "pages":
            yield from wikitext_pages(path.read_text(encoding="utf-8"))
        elif kind == "jsonl":
            with gzip.open(path, "rt", encoding="utf-8") if zipped else path.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        else:
            data = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
            rows = json.loads(data)
            yield from rows if isinstance(rows, list) else [rows]
    except (ValueError, OSError, EOFError) as error:  # pyarrow's ArrowInvalid is a ValueError
        if isinstance(error, UserError):
            raise
        several = kind == "json" and "Extra data" in str(error)
        remedy = "one object a line is .jsonl: rename it" if several else "write it again"
        raise UserError(
            f"evaluate.task_data.{task}: {str(path)!r} cannot be read as {kind}: {first_line(error)}; {remedy}"
        ) from None


def wikitext_pages(text: str) -> Iterator[Row]:
    """The pages of a WikiText file in its official line layout: a page begins at a heading of one '='.

    The same pages, headings and blank lines included, as the dataset EleutherAI/wikitext_document_level.
    """
    page: list[str] = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if "".join(page).strip():
                yield {"page": "\n".join(page)}
            page = []
        page.append(line)
    yield {"page": "\n".join(page)}
