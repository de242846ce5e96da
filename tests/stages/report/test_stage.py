"""The report: right numbers in the right cells, findings that follow the numbers, text that is never interpreted."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazypipe.stages.contract import Artifact, Context, Outputs
from lazypipe.stages.evaluate import stage as evaluate
from lazypipe.stages.evaluate.config import EvaluateConfig, ExtrapolationConfig
from lazypipe.stages.facts import ReportFacts
from lazypipe.stages.figures.style import new_figure
from lazypipe.stages.pretrain import stage as pretrain
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.report import page as report_page
from lazypipe.stages.report import stage as report
from lazypipe.stages.report.config import ReportConfig
from lazypipe.stages.report.findings import findings
from lazypipe.stages.report.rows import variants_of
from lazypipe.stages.report.table import terminal_rows
from lazypipe.stages.sparsity import stage as sparsity
from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.tokenization.config import TokenizeConfig
from tests.stages.made_facts import evaluate_facts, pretrain_facts, sparsity_facts, tokenize_facts
from tests.stages.pretrain.toy_training import tiny_run, toy_corpus
from tests.stages.tiny_experiment import context_in

HOSTILE = "<script>alert(1)</script> | `x` **b** [a](http://x) ![i](y) </pre> &lt; \\| $x$ \x1b[31m \u202e # h"
UNIGRAM_ENTROPY = 5.5


def artifact(directory: Path, config: Any, metrics: dict[str, float], facts: dict[str, Any], **more: Any) -> Artifact:
    directory.mkdir(parents=True, exist_ok=True)
    return Artifact(directory, {"config": config.model_dump(mode="json"), "metrics": metrics, "facts": facts, **more})


def upstream(root: Path, losses: dict[str, float | None], texts: str = "Speak, I charge thee.") -> dict[str, Artifact]:
    """Upstream artifacts of made-up variants: those whose name starts with "lazy" are lazy, the others standard."""
    splits = {
        name: {"documents": 2, "tokens": 1234567, "bytes": 3456789, "shards": []} for name in ("train", "validation")
    }
    inputs = {
        "tokenize": artifact(
            root / "tokenize",
            TokenizeConfig(),
            {"unigram_entropy": UNIGRAM_ENTROPY, "bytes_per_token": 2.8},
            tokenize_facts(vocab_size=2048, splits=splits),
            fingerprint="f" * 64,
            generation="g0002",
            created="2026-01-02T03:04:05+00:00",
            code={"commit": "c" * 40, "dirty": True},
        )
    }
    for number, (name, loss) in enumerate(losses.items()):
        lazy = name.startswith("lazy")
        mixer = "lazy" if lazy else "standard"
        trained = inputs[f"pretrain/{name}"] = artifact(
            root / "pretrain" / name,
            PretrainConfig.model_validate({"model": {"mixer": mixer}, "seed": 3}),
            {"loss": 4.0, "tokens_per_s": 1000.0 + 500 * number},
            pretrain_facts(parameters=800_000 + 2064 * lazy),
            warnings=["<b>bold</b> warning", {"message": "skipped", "step": 5, "ranks": [1]}] if lazy else [],
        )
        context = Context(trained.path, trained.path)
        context.log_table(
            "history",
            [{"step": i, "loss": 7.0 - i, "validation_loss": loss if i == 4 else None} for i in range(1, 5)],
        )
        metrics = {} if loss is None else {"validation_loss": loss, "perplexity": float(np.exp(loss))}
        evaluated = inputs[f"evaluate/{name}"] = artifact(
            root / "evaluate" / name,
            EvaluateConfig(),
            {**metrics, "perplexity_at/512": 90.0 + number},
            evaluate_facts(),
        )
        context = Context(evaluated.path, evaluated.path)
        context.log_table(
            "context_lengths",
            [
                {"context_length": length, "extrapolation": length > 256, "perplexity": 80.0 + number + length / 100}
                for length in (64, 512)
            ],
        )
        context.log_table("continuations", [{"prompt": texts, "method": "greedy", "text": texts}])
        zeros = 0.7123 - number / 100 if lazy else 0.0
        moved = {"tau_moved": 0.25, "tau_min": -1.0, "tau_max": -0.75, "tau_mean": -0.9, "bias_moved": 0.5}
        measured = inputs[f"sparsity/{name}"] = artifact(
            root / "sparsity" / name,
            SparsityConfig(),
            {
                "sparsity": zeros,
                "untrained_sparsity": 0.6 * lazy,
                "sink": 0.01 if lazy else 0.2,
                **(moved if lazy else {}),
            },
            sparsity_facts(mixer),
        )
        context = Context(measured.path, measured.path)
        context.log_table(
            "heads",
            [
                {
                    "layer": i,
                    "head": j,
                    "sparsity": zeros,
                    "untrained_sparsity": 0.1,
                    "sink": 0.1,
                    "untrained_sink": 0.1,
                }
                for i in range(2)
                for j in range(2)
            ],
        )
        if number < 2:  # figures cost most of the time of these tests
            context.log_figure("attention_layer_0", new_figure(1, 1))
        if lazy and number < 2:
            context.log_figure("tau_heat_map", new_figure(1, 1))
    return inputs


class Page(HTMLParser):
    """What a browser would see: tags, text, and the text of each <pre>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.blocks: list[str] = []
        self._in_pre = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self._in_pre = True
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_pre = self._in_pre and tag != "pre"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_pre:
            self.blocks[-1] += data


def run(root: Path, inputs: dict[str, Artifact], title: str = "two variants") -> tuple[Outputs, Path]:
    context = context_in(root / "report")
    return report.run(ReportConfig(title=title), inputs, context), context.output_dir


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outputs, Path]:
    root = tmp_path_factory.mktemp("two")
    return run(root, upstream(root, {"lazy": 4.31, "standard": 4.42}, HOSTILE), HOSTILE)


def stored(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def test_json_and_metrics_hold_the_upstream_numbers(two: tuple[Outputs, Path]) -> None:
    outputs, folder = two
    found = stored(folder)
    lazy, standard = found["rows"]
    assert (lazy["variant"], standard["variant"], found["reference"]) == ("lazy", "standard", "standard")
    assert lazy["validation_loss"] == 4.31 and lazy["sparsity"] == 0.7123 and lazy["untrained_sparsity"] == 0.6
    assert lazy["parameters_difference"] == 2064 and standard["parameters_difference"] == 0
    assert standard["tokens_per_s"] == 1500 and found["unigram_entropy"] == UNIGRAM_ENTROPY
    assert outputs.metrics["lazy/validation_loss"] == 4.31 and outputs.metrics["standard/sink"] == 0.2
    assert outputs.metrics["lazy/perplexity_at/512"] == 90
    assert outputs.facts == ReportFacts(variants=["lazy", "standard"], reference="standard")


def test_terminal_table_ends_with_the_yardstick(two: tuple[Outputs, Path]) -> None:
    columns, rows = terminal_rows(stored(two[1]))
    assert [row[0] for row in rows] == ["lazy", "standard", "(unigram)"]
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    assert table[0]["val loss"] == "4.310" and table[0]["sparsity"] == "71.2 %" and table[0]["untrained"] == "60.0 %"
    assert table[1]["sparsity"] == "0 %" and table[1]["ppl@512"] == "91.00" and table[1]["params"] == "800,000"
    assert table[2]["val loss"] == "5.500" and table[2]["sparsity"] == "–"


def test_findings_follow_the_numbers(two: tuple[Outputs, Path]) -> None:
    said = {finding["topic"]: finding["sentence"] for finding in stored(two[1])["findings"]}
    assert said["Loss"].startswith("lazy has the lowest validation loss, 4.310 nats per token: 0.110 below standard")
    assert "all variants are 1.080 to 1.190 nats below" in said["Yardstick"]
    assert said["Sparsity"].endswith("71.2 % in lazy (60.0 % before training), none in standard.")
    assert "0.0100 in lazy (the lowest) and 0.200 in standard (the highest)" in said["Sink"]
    assert said["Speed"].startswith("standard trained fastest, at 1,500 tokens per second: 1.50 times as fast as lazy")
    assert said["Size"] == "Against standard: lazy 2,064 parameters (+0.26 %) more."
    assert "in lazy τ moved by up to 0.250 (to between -1.000 and -0.750)" in said["Learned thresholds"]
    assert "once (seed 3)" in said["Certainty"]


def test_findings_turn_round_when_the_numbers_do(tmp_path: Path) -> None:
    inputs = upstream(tmp_path, {"lazy": 5.9, "standard": 4.0, "standard_b": 4.0})
    rows = report.comparison("x", inputs["tokenize"], variants_of(inputs))
    said = {finding.topic: finding.sentence for finding in findings(rows)}
    assert said["Loss"] == "standard and standard_b share the lowest validation loss, 4.000 nats per token."
    assert said["Yardstick"].endswith(
        "standard and standard_b are 1.500 nats below, lazy is not below it and has learned less than that."
    )


def test_html_is_one_page_without_network_or_script_and_shows_hostile_text_as_it_stands(
    two: tuple[Outputs, Path],
) -> None:
    text = (two[1] / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    document = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "ul", "li", "strong", "code"}
    table = {"table", "thead", "tbody", "tr", "th", "td"}
    assert {tag for tag, _ in page.tags} == document | table | {"img", "pre"}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 6 and all(str(source).startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import", text)
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert page.blocks == [f"\n{shown}{shown}\n"] * 2  # prompt and continuation of both variants
    assert " ".join(shown.split()) in page.text.replace("\n", " ")  # the title
    assert "<b>bold</b> warning" in page.text
    assert "step 5: skipped (rank 1)" in page.text


def test_markdown_marks_the_best_and_its_figures_exist(two: tuple[Outputs, Path]) -> None:
    folder = two[1]
    text = (folder / "report.md").read_text(encoding="utf-8")
    lazy = next(line for line in text.splitlines() if line.startswith("| lazy |"))
    standard = next(line for line in text.splitlines() if line.startswith("| standard |"))
    assert (
        "**4.310**" in lazy
        and "**71.2 %**" in lazy
        and "**1,500**" in standard
        and "**" not in standard.replace("**1,500**", "")
    )
    assert "| lazy | 80.64 | 85.12 † |" in text and "| standard | 81.64 | 86.12 † |" in text
    assert "| variant | model.mixer |" in text and "| lazy | lazy |" in text and "| standard | standard |" in text
    assert "ffffffffffff | g0002 | 2026-01-02T03:04:05+00:00" in text and "cccccccccccc with changes" in text
    figures_named = re.findall(r"\]\((figures/[^)]*)\)", text)
    assert len(figures_named) == 6
    for name in figures_named:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_one_variant_without_loss_still_makes_a_page(tmp_path: Path) -> None:
    outputs, folder = run(tmp_path, upstream(tmp_path, {"__lazy_": None}))
    assert "__lazy_/validation_loss" not in outputs.metrics and outputs.metrics["__lazy_/sparsity"] == 0
    assert "__lazy_" in Page((folder / "report.html").read_text(encoding="utf-8")).text
    _, rows = terminal_rows(stored(folder))
    assert rows[0][:2] == ["__lazy_", "–"]


def test_twenty_variants(tmp_path: Path) -> None:
    losses: dict[str, float | None] = {f"lazy_{index}": 4 + index / 10 for index in range(19)}
    losses["standard"] = 4.05
    _, folder = run(tmp_path, upstream(tmp_path, losses))
    found = stored(folder)
    assert [row["variant"] for row in found["rows"]] == list(losses)
    said = {finding["topic"]: finding["sentence"] for finding in found["findings"]}
    assert "0.050 below standard and 1.800 below lazy_18, the highest" in said["Loss"]
    assert all(len(sentence) < 500 for sentence in said.values())


def test_missing_result_of_a_variant_is_named(tmp_path: Path) -> None:
    inputs = upstream(tmp_path, {"lazy": 4.0})
    del inputs["evaluate/lazy"]
    with pytest.raises(ValueError, match="missing: evaluate/lazy"):
        variants_of(inputs)
    with pytest.raises(ValueError, match="at least one variant"):
        variants_of({"tokenize": inputs["tokenize"]})


def test_report_of_a_real_tiny_experiment(tmp_path: Path) -> None:
    corpus = toy_corpus(tmp_path / "tokenize")
    inputs = {"tokenize": corpus}
    stages: list[tuple[str, Any, Any]] = [
        (
            "evaluate",
            evaluate,
            EvaluateConfig(
                extrapolation=ExtrapolationConfig(context_lengths=(16, 96)), prompts=("the king",), max_new_tokens=4
            ),
        ),
        ("sparsity", sparsity, SparsityConfig(windows=3, seq_len=32, heat_map_heads=1)),
    ]
    variants = {
        "lazy": tiny_run("lazy", steps=6),
        "standard": tiny_run("standard", steps=6),
        "mlp": tiny_run("mlp", steps=6),
        "mlp_hybrid": hybrid_run("mlp", [2]),
    }
    for name, config in variants.items():
        upstream_of_both = {
            "tokenize": corpus,
            "pretrain": finish(tmp_path, "pretrain", name, pretrain, config, inputs),
        }
        inputs[f"pretrain/{name}"] = upstream_of_both["pretrain"]
        for stage, module, stage_config in stages:
            inputs[f"{stage}/{name}"] = finish(tmp_path, stage, name, module, stage_config, upstream_of_both)
    outputs, folder = run(tmp_path, inputs, "tiny")
    metrics = outputs.metrics
    assert metrics["standard/sparsity"] == 0 and metrics["standard/surviving_mass"] == pytest.approx(1, abs=1e-6)
    assert 0.4 < metrics["lazy/sparsity"] < 1 and metrics["lazy/surviving_mass"] < 1
    lazy, standard, mlp, hybrid = stored(folder)["rows"]
    assert lazy["validation_loss"] == inputs["evaluate/lazy"].metrics["validation_loss"]
    assert lazy["parameters_difference"] == 2 * (2 * 16 + 2)  # two layers of a bias [2, 16] and a tau [2]
    assert lazy["perplexity_at/96"] > 0 and lazy["tau_moved"] > 0 and "tau_moved" not in standard
    # No attention weights anywhere, and in one of two layers.
    assert mlp["perplexity"] > 0 and "sparsity" not in mlp and "mlp/sink" not in metrics
    assert hybrid["surviving_mass"] == pytest.approx(1, abs=1e-6) and hybrid["mixer"] == "mlp, standard in 2"
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "Learned thresholds" in page.text and len(page.blocks) == 8


def hybrid_run(mixer: str, pattern: object) -> PretrainConfig:
    config = tiny_run(mixer, steps=6)
    model = config.model.model_dump() | {"pattern": pattern}
    return PretrainConfig.model_validate(config.model_dump() | {"model": model})


def finish(root: Path, stage: str, mixer: str, module: Any, config: Any, inputs: dict[str, Artifact]) -> Artifact:
    context = context_in(root / stage / mixer)
    outputs: Outputs = module.run(config, inputs, context)
    manifest = {"config": config.model_dump(mode="json"), "facts": outputs.facts.to_json(), "metrics": outputs.metrics}
    return Artifact(context.output_dir, manifest)


CHARACTERS = st.one_of(st.sampled_from("<>&|`*_[]()\\!#~$\"'-+=:./\n\t\r \x02\x03\u2028\ud800"), st.characters())


@settings(max_examples=150, deadline=None)
@given(st.text(CHARACTERS, max_size=60))
def test_any_text_comes_out_of_markdown_as_it_went_in(text: str) -> None:
    source = (
        f"# Title\n\n<pre>\n<strong>{report_page.literal(text)}</strong>\n</pre>\n\n"
        f"* item: {report_page.inline(text)}\n\n| a | b |\n|---|---|\n| {report_page.inline(text)} | end |\n"
    )
    page = Page(report_page.html_page(source, "title", Path()))
    names = [tag for tag, _ in page.tags if tag not in ("html", "head", "meta", "title", "style", "body")]
    expected = ["h1", "pre", "strong", "ul", "li", "table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert names == expected
    # A browser joins line ends and drops none of the rest; outside <pre> it folds white space.
    assert page.blocks == [f"\n{report_page.visible(text)}\n"]
    folded = " ".join(report_page.visible(text).split())
    assert " ".join(page.text.split()).count(folded) >= 3


def test_reading_and_writing_a_report_needs_no_torch() -> None:
    code = (
        "import sys, lazypipe.stages.report.table\n"
        "light = sorted({'torch', 'matplotlib', 'numpy', 'pyarrow', 'jinja2'} & "
        "sys.modules.keys()); import lazypipe.stages.report.stage; print(light, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
