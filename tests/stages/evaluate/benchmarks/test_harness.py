"""The adapter against sums by hand in float64, for every mechanism, and against the harness's Hugging Face backend."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from lazypipe.model.checkpoint import Checkpoint
from lazypipe.model.config import ModelConfig
from lazypipe.model.generate import generate
from lazypipe.model.mixers.registry import MIXERS
from lazypipe.model.transformer import Transformer
from lazypipe.pipeline.bench import evaluate as harness_bench
from lazypipe.pipeline.bench.evaluate import save_llama, train_tokenizer
from lazypipe.stages.contract import UserError
from lazypipe.stages.evaluate.benchmarks.harness import HarnessModel
from lazypipe.stages.evaluate.benchmarks.run import evaluate_task
from lazypipe.stages.evaluate.benchmarks.suites import SUITES, expand
from lazypipe.stages.evaluate.benchmarks.task_files import read_rows
from lazypipe.stages.evaluate.benchmarks.tasks import FILES, tasks_folder
from lazypipe.stages.evaluate.config import EvaluateConfig
from tests.model.tiny_model import VOCAB, awake, tiny
from tests.stages.evaluate.benchmarks.benchmark_files import write_files

EOS = 0


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of one token per word: word k is token k; w0 ends a document."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def random_pairs(count: int = 24, longest: int = 28) -> list[tuple[list[int], list[int]]]:
    """Contexts of 1 ... `longest` tokens; some share a context, some begin with another's continuation."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randint(1, VOCAB, (size,), generator=generator).tolist()  # noqa: E731
    pairs = []
    for number in range(count // 4):
        context = draw(1 + number * longest // (count // 4))
        first = draw(1)
        pairs += [(context, first), (context, draw(1)), (context, first + draw(2)), (context, draw(4))]
    return pairs


def by_hand(model: Transformer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = model(tokens[:, :-1])[0, len(context) - 1 :].double()
    targets = torch.tensor(continuation)
    total = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets].sum()
    return float(total), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("mixer", MIXERS)
def test_log_likelihoods_of_every_mechanism_whatever_the_batches(mixer: str, words: Path) -> None:
    model = awake(tiny(mixer))
    pairs = random_pairs()
    requests = instances("loglikelihood", [(text(context), " " + text(after)) for context, after in pairs])
    expected = [by_hand(model, context, after) for context, after in pairs]
    batches: list[dict[str, Any]] = [{"batch_size": 1}, {"batch_size": 5}, {"batch_tokens": 10_000}]
    for sizes in batches:
        adapter = HarnessModel(model, words, EOS, **sizes)
        found = adapter.loglikelihood(requests)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-4), sizes
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        # Of four requests to a context, the first two differ in their last token alone: one row serves both.
        assert adapter.counts.forward_rows == 3 * len(pairs) // 4 and adapter.counts.requests == len(pairs)


def test_a_greedy_continuation_is_recognised(words: Path) -> None:
    model = awake(tiny("lazy"))
    prompt = [5, 9, 2]
    said = generate(model, torch.tensor([prompt]), 4)[0, 3:].tolist()
    other = [*said[:3], (said[3] + 1) % VOCAB]
    requests = instances("loglikelihood", [(text(prompt), " " + text(said)), (text(prompt), " " + text(other))])
    assert [greedy for _, greedy in HarnessModel(model, words, EOS).loglikelihood(requests)] == [True, False]


def test_long_contexts_lose_their_first_tokens_and_are_counted(words: Path) -> None:
    model = awake(tiny("standard"))
    context, after = list(range(1, 31)), [7, 8, 9]
    adapter = HarnessModel(model, words, EOS, max_length=12)
    (score, _), (short, _) = adapter.loglikelihood(
        instances("loglikelihood", [(text(context), " " + text(after)), ("w4 w5", " w6")])
    )
    assert score == pytest.approx(by_hand(model, context[-10:], after)[0], abs=1e-4)
    assert short == pytest.approx(by_hand(model, [4, 5], [6])[0], abs=1e-4)
    assert (adapter.counts.truncated, adapter.counts.tokens_cut) == (1, 20)


def test_a_continuation_longer_than_the_model_is_scored_in_pieces(words: Path) -> None:
    model = awake(tiny("standard"))
    context, after = [3, 4, 5], list(range(1, 11))
    ((score, _),) = HarnessModel(model, words, EOS, max_length=4).loglikelihood(
        instances("loglikelihood", [(text(context), " " + text(after))])
    )
    whole = context + after
    pieces = [(whole[3:4], whole[4:7]), (whole[6:7], whole[7:11]), (whole[8:11], whole[11:13])]
    del pieces[0]
    first = by_hand(model, whole[2:3], whole[3:7])[0]
    assert score == pytest.approx(first + sum(by_hand(model, one, two)[0] for one, two in pieces), abs=1e-4)


def test_the_bos_setting_and_empty_contexts(words: Path) -> None:
    model = awake(tiny("standard"))
    requests = instances("loglikelihood", [("w4 w5", " w6"), ("", "w6 w7")])
    off = HarnessModel(model, words, EOS).loglikelihood(requests)
    on = HarnessModel(model, words, EOS, bos=True).loglikelihood(requests)
    assert off[0][0] == pytest.approx(by_hand(model, [4, 5], [6])[0], abs=1e-4)
    assert on[0][0] == pytest.approx(by_hand(model, [EOS, 4, 5], [6])[0], abs=1e-4)
    for score in (off[1][0], on[1][0]):  # in batches of other widths, which round differently
        assert score == pytest.approx(by_hand(model, [EOS], [6, 7])[0], abs=1e-4)


def test_rolling_windows_share_no_prediction(words: Path) -> None:
    model = awake(tiny("lazy"))
    ids = torch.randint(1, VOCAB, (21,), generator=torch.Generator().manual_seed(3)).tolist()
    adapter = HarnessModel(model, words, EOS, max_length=8)
    (score,) = adapter.loglikelihood_rolling(instances("loglikelihood_rolling", [(text(ids),)]))
    expected = by_hand(model, [EOS], ids[:8])[0] + by_hand(model, ids[7:8], ids[8:16])[0]
    expected += by_hand(model, ids[12:16], ids[16:])[0]  # the last window is as long as the others
    assert score == pytest.approx(expected, abs=1e-4)
    assert adapter.counts.truncated == 0


def test_continuations_stop_where_the_task_says(words: Path) -> None:
    model = awake(tiny("lazy"))
    prompts = [[5, 9, 2], [8, 1, 3], [4] * 40]
    said = [generate(model, torch.tensor([prompt[-26:]]), 6, stop_token=EOS)[0].tolist() for prompt in prompts]
    said = [ids[len(prompt[-26:]) :] for ids, prompt in zip(said, prompts, strict=True)]
    stop = f"w{said[0][2]}"
    settings = {"until": [stop], "max_gen_toks": 6, "do_sample": False}
    requests = instances("generate_until", [(text(prompt), settings) for prompt in prompts])
    adapter = HarnessModel(model, words, EOS)
    found = adapter.generate_until(requests)
    expected = [text(ids).split("w0")[0].split(stop)[0] for ids in said]
    assert [answer.split() for answer in found] == [answer.split() for answer in expected]
    assert (adapter.counts.truncated, adapter.counts.tokens_cut) == (1, 14)


def test_sampled_continuations_follow_seed_and_settings_whatever_the_batches(words: Path) -> None:
    model = awake(tiny("lazy"))
    prompts = [[5, 9, 2], [8, 1, 3], [5, 9, 2], [7, 7]]
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0, "top_p": 0.9, "top_k": 20}
    requests = instances("generate_until", [(text(prompt), settings) for prompt in prompts])
    one, many = (HarnessModel(model, words, EOS, batch_size=size, seed=7).generate_until(requests) for size in (1, 4))
    assert one == many and len(set(one)) == 4  # the same question twice is answered twice
    for number, (prompt, answer) in enumerate(zip(prompts, one, strict=True)):
        draw = torch.Generator().manual_seed(7 + number)
        whole = generate(model, torch.tensor([prompt]), 8, 2.0, 20, draw, stop_token=EOS, top_p=0.9)[0].tolist()
        assert answer.split() == text(whole[len(prompt) :]).split("w0")[0].split()


@pytest.mark.parametrize("more", [{"num_beams": 4}, {"repetition_penalty": 1.3}])
def test_a_setting_that_generation_would_ignore_is_refused(words: Path, more: dict[str, Any]) -> None:
    requests = instances("generate_until", [("w4 w5", {"until": ["w1"], "max_gen_toks": 4, **more})])
    ((name, value),) = more.items()
    with pytest.raises(UserError, match=f"{name}={value}, which would be ignored"):
        HarnessModel(awake(tiny("standard")), words, EOS).generate_until(requests)
    plain = instances("generate_until", [("w4 w5", {"until": ["w1"], "max_gen_toks": 4, "num_beams": 1})])
    assert HarnessModel(awake(tiny("standard")), words, EOS).generate_until(plain)


# ---- the harness's own command line, with its Hugging Face backend


def test_metrics_equal_those_of_the_harness_and_its_hugging_face_backend(tmp_path: Path) -> None:
    """All tasks of both suites: choice accuracies exactly, perplexities to 1e-4 relative."""
    files, known = write_files(tmp_path / "files")
    tokenizer_json = tmp_path / "tokenizer.json"
    train_tokenizer(known, 300, tokenizer_json)  # many tokens: some prompts are too long
    vocab_size = Tokenizer.from_file(str(tokenizer_json)).get_vocab_size()
    config = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=48, init_std=0.2)
    model = Transformer(config, vocab_size, seed=1).eval()
    save_llama(model, tokenizer_json, tmp_path / "llama")
    tasks = expand(SUITES)
    checkpoint = Checkpoint(model, vocab_size, 0, tmp_path)
    settings = EvaluateConfig(tasks=tasks, task_data={task: files[task] for task in tasks}, limit=4)
    ours = {task: evaluate_task(settings, task, checkpoint, tokenizer_json)[0]["rows"] for task in tasks}

    theirs = harness_command_line(tmp_path, files, tasks)
    assert any(row["truncated"] for rows in ours.values() for row in rows)
    for task in tasks:
        for row in ours[task]:
            expected = theirs[task][f"{row['metric']},none"]
            if row["metric"].startswith("acc"):
                assert row["value"] == expected, (task, row["metric"])
            else:
                assert row["value"] == pytest.approx(expected, rel=1e-4), (task, row["metric"])


def harness_command_line(folder: Path, files: dict[str, str], tasks: tuple[str, ...]) -> Any:
    """`lm_eval --model hf` on the harness's own tasks, pointed at local files the way its documentation says."""
    definitions = folder / "definitions"
    definitions.mkdir()
    paths = []
    for task in tasks:
        data = definitions / f"{task}.jsonl"
        rows = read_rows(Path(files[task]), task)  # in the fields the harness reads
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        original = tasks_folder() / FILES[task]
        tested = "test_split: test" in original.read_text(encoding="utf-8") or task == "arc_challenge"
        splits: dict[str, str | None] = {"training_split": None, "validation_split": None, "test_split": None}
        splits["test_split" if tested else "validation_split"] = "train"
        local = {
            "include": str(original),
            "task": f"local_{task}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": str(data)},
            **splits,
        }
        paths.append(definitions / f"local_{task}.yaml")
        paths[-1].write_text(yaml.safe_dump(local), encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={folder / 'llama'},dtype=float32,max_length=48"]
    command += ["--tasks", ",".join(map(str, paths)), "--limit", "4", "--output_path", str(folder / "results.json")]
    environment = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "DISABLE_MULTIPROC": "1", "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = next(folder.rglob("results*.json"))
    found = json.loads(results.read_text(encoding="utf-8"))["results"]
    return {task: found[f"local_{task}"] for task in tasks}


def test_the_benchmark_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = ["--questions", "6", "--repeats", "1", "--vocab-size", "2048", "--hidden-size", "32", "--num-layers", "1"]
    assert harness_bench.main([*few, "--json", str(tmp_path / "rates.json")]) == 0
    (row,) = json.loads((tmp_path / "rates.json").read_text())
    assert row["requests"] == 18 and row["ours"] > 0 and row["hflm"] > 0
    assert row["largest_difference"] < 1e-3
    assert "HFLM/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--questions", "0"], "--questions 0: must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--repeats", "-1"], "--repeats -1: must be at least 1"),
        (["--vocab-size", "4096", "100"], "--vocab-size 100: must be at least 2048"),
        (["--hidden-size", "100", "--num-heads", "3"], "--hidden-size 100: must be a multiple of twice --num-heads, 6"),
        (["--json", "absent/rates.json"], "--json absent/rates.json: absent is no folder"),
    ],
)
def test_the_benchmark_command_refuses_what_it_cannot_time(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        harness_bench.main(arguments)
