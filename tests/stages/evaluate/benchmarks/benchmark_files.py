"""Small files of every benchmark of both suites, in the fields their authors published, and what a right answer reads.

The texts are written by hand after the papers' prompts, not with the harness, so that they check its prompts as well.
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any

WORDS = ["the", "king", "queen", "fool", "sword", "crown", "night", "loves", "fears", "finds", "speaks", "of", "and"]
WORDS += ["runs", "to", "a", "red", "old", "house"]
DOCUMENTS = 5


def sentence(rng: random.Random, words: int = 6) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def distinct(rng: random.Random, count: int) -> list[str]:
    """Sentences of which none is another: their first words differ."""
    return [f"{first.capitalize()} {sentence(rng).lower()}" for first in rng.sample(WORDS, count)]


def documents(seed: int = 0) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """({task: rows}, the texts a model that knows every answer would say)."""
    rng = random.Random(seed)
    rows: dict[str, list[dict[str, Any]]] = {}
    known: list[str] = []

    def add(task: str, row: dict[str, Any], right: str) -> None:
        rows.setdefault(task, []).append(row)
        known.append(right)

    for number in range(DOCUMENTS):
        stem = f"number {number} {sentence(rng)}"
        gold = rng.randrange(2)
        one, two = distinct(rng, 2)
        goal = f"goal {stem}"
        right = (one, two)[gold]
        add("piqa", {"goal": goal, "sol1": one, "sol2": two, "label": gold}, f"Question: {goal}\nAnswer: {right}")

        endings, gold = distinct(rng, 4), rng.randrange(4)
        swag = {"activity_label": "Fencing", "ctx_a": f"Swag {stem}", "ctx_b": "he", "endings": endings, "label": gold}
        swag |= {"ctx": f"Swag {stem} he", "ind": number, "source_id": "none"}
        add("hellaswag", swag, f"Fencing: Swag {stem} He {endings[gold]}")

        gold = rng.randrange(2)
        names = ("Anna", "Bert")
        grande = {"sentence": f"Grande {number}: _ won the crown.", "option1": "Anna", "option2": "Bert"}
        add("winogrande", {**grande, "answer": str(gold + 1)}, f"Grande {number}: {names[gold]} won the crown.")

        for task, shape in (("arc_easy", "nested"), ("arc_challenge", "flat")):
            texts, gold = distinct(rng, 4), rng.randrange(4)
            question = f"{task} {stem}"
            labels = list("ABCD")
            choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
            asked: Any = {"stem": question, "choices": choices} if shape == "nested" else question
            row = {"id": str(number), "question": asked, "answerKey": labels[gold]}
            row |= {} if shape == "nested" else {"choices": {"text": texts, "label": labels}}
            add(task, row, f"Question: {question}\nAnswer: {texts[gold]}")

        answers, gold = distinct(rng, 3), rng.randrange(3)
        social = {"context": f"Social {stem}", "question": "Why?"} | dict(
            zip(("answerA", "answerB", "answerC"), answers, strict=True)
        )
        add("social_iqa", {**social, "correct": "ABC"[gold]}, f"Q: Social {stem} Why?\nA: {answers[gold]}")

        truth = rng.random() < 0.5
        boolq = {"passage": f"Passage {stem}", "question": "is it so", "title": "none", "answer": truth}
        add("boolq", boolq, f"Passage {stem}\nQuestion: is it so?\nAnswer: {'yes' if truth else 'no'}")

        one, two = distinct(rng, 2)
        gold = rng.randrange(2)
        copa = {"premise": f"Copa {stem}", "choice1": one, "choice2": two, "question": "cause", "label": gold}
        right = (one, two)[gold]
        # Two spaces: the harness's delimiter and the one its choices begin with.
        add("copa", copa, f"Copa {stem.removesuffix('.')} because  {right[0].lower()}{right[1:]}")

        texts = distinct(rng, 4)
        wrong = {f"distractor{i + 1}": text for i, text in enumerate(texts[:3])}
        sciq = {"question": f"sciq {stem}", "support": "Support.", **wrong, "correct_answer": texts[3]}
        add("sciq", sciq, f"Support.\nQuestion: sciq {stem}\nAnswer: {texts[3]}")

        gold = rng.randrange(2)
        rte = {"premise": f"Rte {stem}", "hypothesis": "It is so.", "label": ("entailment", "not_entailment")[gold]}
        add("rte", rte, f"Rte {stem}\nQuestion: It is so. True or False?\nAnswer: {('True', 'False')[gold]}")

        texts, gold = distinct(rng, 4), rng.randrange(4)
        choices_of = {"text": texts, "label": list("ABCD")}
        book = {"question_stem": f"book {stem}", "choices": choices_of, "answerKey": "ABCD"[gold]}
        add("openbookqa", book, f"book {stem} {texts[gold]}")

        text = f"lambada {number} {sentence(rng, 12).removesuffix('.')} crown"
        add("lambada_openai", {"text": text}, text)
    rows["wikitext"] = [{"page": f" = Page {i} = \n \n {sentence(rng, 40)} \n"} for i in range(DOCUMENTS)]
    return rows, known


def write_files(folder: Path, seed: int = 0) -> tuple[dict[str, str], list[str]]:
    """({task: file}, the right texts): jsonl, jsonl.gz, json, parquet, and a WikiText file in its own layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    rows, known = documents(seed)
    files = {}
    for task, found in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        if task == "wikitext":
            path = folder / "wiki.test.raw"
            path.write_text("".join(row["page"] for row in found), encoding="utf-8")
        elif task == "hellaswag":
            path = folder / "hellaswag.jsonl.gz"
            path.write_bytes(gzip.compress(lines.encode()))
        elif task == "copa":
            path = folder / "copa.json"
            path.write_text(json.dumps(found), encoding="utf-8")
        elif task == "sciq":
            path = folder / "sciq.parquet"
            pq.write_table(pa.Table.from_pylist(found), path)
        else:
            path = folder / f"{task}.jsonl"
            path.write_text(lines, encoding="utf-8")
        files[task] = str(path)
    return files, known
