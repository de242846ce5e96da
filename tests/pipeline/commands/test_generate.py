"""`lazypipe generate` and `lazypipe bench generate` on a real checkpoint, and text that grows token by token."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lazypipe.model.baselines import build_model
from lazypipe.model.checkpoint import save_checkpoint
from lazypipe.model.transformer import Transformer
from lazypipe.pipeline.bench import generate as generate_bench
from lazypipe.pipeline.cli import app
from lazypipe.pipeline.commands.generate import GrowingText
from lazypipe.stages.contract import UserError
from tests.baselines_package import import_baselines_package
from tests.model.tiny_model import tiny, with_side_text
from tests.pipeline.tiny import FinishedRun, lazypipe

TEXT = "the wind and the whale, naïve café — 鯨 and 🐳; the end of the tale. " * 3


def byte_tokenizer() -> Any:
    """A byte-level BPE of 290 tokens: most characters beyond ASCII are several tokens."""
    from lazypipe.stages.tokenization.tokenizer import train_tokenizer

    return train_tokenizer([TEXT], 290)


BYTES = byte_tokenizer()
TOKENS = st.integers(0, BYTES.get_vocab_size() - 1)


def word_tokenizer() -> Any:
    """Words with SentencePiece's mark for a space, which its decoder drops at the beginning of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["▁the", "▁end", "▁of", "▁tale", "s", "鯨"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="s"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@settings(max_examples=300, deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=8), st.lists(TOKENS, max_size=30))
def test_pieces_join_to_the_text_of_the_whole_whatever_the_tokens(prompt: list[int], new: list[int]) -> None:
    """Random tokens are mostly torn characters. The prompt is whole: a text that somebody typed."""
    prompt = BYTES.encode(BYTES.decode(prompt)).ids or [0]
    text = GrowingText(BYTES, prompt)
    pieces = [text.add(token) for token in new] + [text.rest()]
    assert BYTES.decode(prompt) + "".join(pieces) == BYTES.decode(prompt + new)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_no_character_is_printed_before_it_is_whole(continuation: str) -> None:
    text = GrowingText(BYTES, BYTES.encode("the ").ids)
    pieces = [text.add(token) for token in BYTES.encode(continuation).ids]
    assert "".join(pieces) + text.rest() == continuation
    if "\ufffd" not in continuation:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_space_at_the_beginning_of_a_token_is_kept() -> None:
    tokenizer = word_tokenizer()
    text = GrowingText(tokenizer, [0])
    assert [text.add(token) for token in (1, 2, 0, 3, 4, 5)] == [" end", " of", " the", " tale", "s", "鯨"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lazy/ and random_qk/, both with the byte tokenizer, whose random weights are far from flat."""
    folder = tmp_path_factory.mktemp("checkpoints")
    BYTES.save(str(folder / "tokenizer.json"))
    for mixer in ("lazy", "random_qk"):
        model = with_side_text(Transformer(tiny(mixer, init_std=0.2), BYTES.get_vocab_size()))
        save_checkpoint(folder / mixer, model, eos_id=0, tokenizer_json=folder / "tokenizer.json")
    return folder


def said(*arguments: str | Path, stdin: str = "") -> str:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def as_json(*arguments: str | Path, stdin: str = "") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(*arguments, "--json", stdin=stdin))
    return found


def test_streamed_text_is_the_text_of_the_tokens(checkpoints: Path) -> None:
    state = torch.get_rng_state()
    options: list[str | Path] = [
        checkpoints / "lazy",
        "the naïve 鯨",
        "--max-new-tokens",
        "20",
        "--top-p",
        "0.9",
        "--seed",
        "4",
    ]
    streamed = said(*options)
    row = as_json(*options)["continuations"][0]
    assert streamed == row["prompt"] + row["text"] + "\n"
    ids = BYTES.encode(row["prompt"]).ids
    assert BYTES.decode(ids + row["tokens"]) == row["prompt"] + row["text"]
    assert len(row["tokens"]) == 20 or row["ended"]
    assert torch.equal(state, torch.get_rng_state())


def test_prompts_and_samples_do_not_depend_on_each_other(checkpoints: Path) -> None:
    options = ["--max-new-tokens", "8", "--temperature", "1", "--top-k", "40"]
    together = as_json(checkpoints / "lazy", "the", "wind and", *options, "--num-samples", "3", "--seed", "5")
    rows = together["continuations"]
    assert [(row["prompt"], row["sample"]) for row in rows] == [(p, s) for p in ("the", "wind and") for s in range(3)]
    for row in rows:
        seed = str(5 + row["sample"])
        alone = as_json(checkpoints / "lazy", row["prompt"], *options, "--seed", seed)["continuations"][0]
        assert (alone["tokens"], alone["text"]) == (row["tokens"], row["text"])
    assert len({tuple(row["tokens"]) for row in rows[:3]}) == 3


def test_prompts_come_from_arguments_files_and_standard_input(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("of the\nwind\n", encoding="utf-8")
    options: list[str | Path] = [checkpoints / "lazy", "--max-new-tokens", "3", "--temperature", "0"]
    rows = as_json(*options, "the end", "--prompt-file", tmp_path / "prompts.txt", "--unprompted")["continuations"]
    assert [row["prompt"] for row in rows] == ["the end", "of the", "wind", ""]
    piped = as_json(*options, "--prompt-file", "-", stdin="of the\nwind\n")["continuations"]
    assert piped == rows[1:3]
    odd = as_json(*options, "--prompt-file", "-", stdin="of\u2028the\r\nwind\x0cand")["continuations"]
    assert [row["prompt"] for row in odd] == ["of\u2028the", "wind\x0cand"]
    text = said(*options, "--prompt-file", "-", stdin="of the\nwind\n")
    assert text == "".join(f"--- prompt {n}\n{row['prompt']}{row['text']}\n" for n, row in enumerate(piped, 1))


def test_a_side_sequence_limits_the_length(checkpoints: Path) -> None:
    prompt = "the wind"
    room = 32 - len(BYTES.encode(prompt).ids)
    found = as_json(checkpoints / "random_qk", prompt, "--max-new-tokens", "500", "--temperature", "0")
    assert found["max_new_tokens"] == room
    row = found["continuations"][0]
    assert len(row["tokens"]) == room or row["ended"]
    with pytest.raises(UserError, match=r"prompt 1 and one new token: .* more than max_seq_len=32"):
        said(checkpoints / "random_qk", TEXT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/absent", "the"], "does not exist; give a checkpoint folder, or an experiment"),
        (["{folder}", "the"], r"config\.json is missing"),
        (["{folder}/bare", "the"], r"has no tokenizer\.json"),
        (["{folder}/torn", "the"], r"is not a tokenizer\.json"),
        (["{folder}/lazy", "the", "--variant", "lazy"], "--variant and overrides belong to an experiment file"),
        (["{folder}/lazy"], "no prompt: give one or more"),
        (["{folder}/lazy", "the", ""], "prompt 2 is empty"),
        (["{folder}/lazy", "--prompt-file", "{folder}/absent.txt"], "--prompt-file .*absent.txt"),
        (["{folder}/lazy", "the", "--temperature", "-1"], "--temperature -1.0: must be 0"),
        (["{folder}/lazy", "the", "--temperature", "nan"], "--temperature nan"),
        (["{folder}/lazy", "the", "--top-p", "0"], "--top-p 0.0: must be above 0"),
        (["{folder}/lazy", "the", "--top-p", "1.5"], "--top-p 1.5"),
        (["{folder}/lazy", "the", "--top-k", "0"], "--top-k 0"),
        (["{folder}/lazy", "the", "--seed", "-1"], "--seed -1"),
        (["{folder}/lazy", "the", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["{folder}/lazy", "the", "--num-samples", "2", "--temperature", "0"], "at temperature 0 all are the same"),
    ],
)
def test_bad_input_is_refused_by_name(checkpoints: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(checkpoints, folder)
    for name in ("bare", "torn"):
        shutil.copytree(folder / "lazy", folder / name)
    (folder / "bare" / "tokenizer.json").unlink()
    (folder / "torn" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        said(*(argument.format(folder=folder) for argument in arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_baseline_is_refused_without_cuda(tmp_path: Path) -> None:
    import_baselines_package()
    BYTES.save(str(tmp_path / "tokenizer.json"))
    model = build_model(tiny("gla"), BYTES.get_vocab_size())
    save_checkpoint(tmp_path / "gla", model, eos_id=0, tokenizer_json=tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="mixer=gla computes with CUDA kernels"):
        said(tmp_path / "gla", TEXT)
    with pytest.raises(UserError, match="mixer=gla computes with CUDA kernels"):
        generate_bench.main([str(tmp_path / "gla")])


def test_an_experiment_and_a_variant_name_a_stored_model(finished_run: FinishedRun, tmp_path: Path) -> None:
    """The continuation is that of the evaluate stage, with its settings; a process of its own prints UTF-8."""
    from tests.pipeline.tiny import current_manifest

    options = ["--max-new-tokens", "4", "--temperature", "0.8", "--top-k", "50"]
    row = as_json(finished_run.config, "the", "--variant", "lazy", *options)["continuations"][0]
    evaluated = current_manifest(finished_run.root, "evaluate", "lazy")
    folder = next((finished_run.root / "store" / "evaluate").glob(f"{evaluated['fingerprint'][:12]}/g*"))
    rows = json.loads((folder / "tables" / "continuations.json").read_text())
    assert row["text"] == next(r["text"] for r in rows if r["method"] == "sampled")

    result = lazypipe("generate", finished_run.config, "the", "--variant", "lazy", *options)
    assert (result.returncode, result.stdout) == (0, f"the{row['text']}\n"), result.stderr
    assert "tokens/s" in result.stderr

    with pytest.raises(UserError, match="several variants; choose one with --variant: lazy, standard"):
        said(finished_run.config, "the")
    with pytest.raises(UserError, match=r"--variant lasy: .* did you mean 'lazy'"):
        said(finished_run.config, "the", "--variant", "lasy")
    other = ["--variant", "lazy", "--set", "pretrain.lr=0.5"]
    with pytest.raises(
        UserError, match=r"pretrain/lazy is not stored below .*; train it first: lazypipe run .* pretrain"
    ):
        said(finished_run.config, "the", *other)
    result = lazypipe("generate", finished_run.config, "the", *other)
    assert result.returncode == 2 and "pretrain.lr=0.5 --only pretrain/lazy" in result.stderr
    assert not (tmp_path / "output").exists()


def test_the_benchmark_times_both_ways(checkpoints: Path) -> None:
    sizes = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1", "--batch", "1", "2"]
    arguments = ["bench", "generate", str(checkpoints / "random_qk"), *sizes]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert [row["batch"] for row in found["tokens_per_s"]] == [1, 2]
    assert all(row["with_cache"] > 0 and row["without_cache"] > 0 for row in found["tokens_per_s"])
    assert found["mixers"] == ["random_qk"]
    table = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout.splitlines()
    assert table[0].startswith("random_qk, cpu with") and len(table) == 4
    with pytest.raises(UserError, match="--prompt-tokens and --new-tokens: 40 tokens are more than max_seq_len=32"):
        CliRunner().invoke(app, [*arguments, "--prompt-tokens", "36"], catch_exceptions=False)
    with pytest.raises(UserError, match="--batch 0"):
        CliRunner().invoke(app, [*arguments, "--batch", "0"], catch_exceptions=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_prompt_in_bold(checkpoints: Path) -> None:
    from lazypipe.pipeline.commands.generate import Sampling, encode, print_stream
    from lazypipe.pipeline.commands.models import load_trained

    trained = load_trained(checkpoints / "lazy")
    encoded, new_tokens = encode(trained, ["the"], 3)
    stream = Terminal()
    count = print_stream(trained, "the", encoded[0], new_tokens, Sampling(3, 0.0, None, None, 0, 1), stream)
    assert stream.getvalue().startswith("\033[1mthe\033[0m") and stream.getvalue().endswith("\n") and count <= 3
