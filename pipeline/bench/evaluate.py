"""Requests per second of our adapter and of the harness's own Hugging Face backend: `lazypipe bench evaluate`.

Both score the same generated questions with the same weights: a model with standard attention is a Llama, so
transformers can run it. Their answers are compared before anything is timed; timings are interleaved, medians.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lazypipe.model.config import ModelConfig
from lazypipe.model.mixers.registry import STANDARD
from lazypipe.model.transformer import Transformer
from lazypipe.pipeline.bench.options import Parser, check_at_least, check_writable, exit_code
from lazypipe.pipeline.bench.timing import interleaved, timed
from lazypipe.stages.contract import UserError

EOS = "<|endoftext|>"
TOKENIZER_SIZE = 2048


def to_llama(model: Transformer) -> Any:
    """The same function as a transformers LlamaForCausalLM, for a model whose layers are all standard attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    if set(config.layer_mixers) != {STANDARD} or config.qk_norm:
        raise UserError(f"mixer={config.mixer}: only a model of standard attention without qk_norm is a Llama")
    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            attention_bias=False,
        )
    )
    names = {
        "embedding.": "model.embed_tokens.",
        "final_norm.": "model.norm.",
        "head.": "lm_head.",
        "layers.": "model.",
    }
    inside = {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mixer.": "self_attn."}
    weights = {}
    for name, weight in model.state_dict().items():
        start = next(start for start in names if name.startswith(start))
        renamed = names[start] + (name if start == "layers." else name.removeprefix(start))
        for ours, theirs in inside.items():
            renamed = renamed.replace(f".{ours}", f".{theirs}")
        weights[renamed] = weight
    if model.head is None:
        weights["lm_head.weight"] = model.embedding.weight
    llama.load_state_dict(weights)
    return llama.eval()


def save_llama(model: Transformer, tokenizer_json: Path, directory: Path) -> None:
    """The model as `to_llama` has it and its tokenizer in a folder that AutoModelForCausalLM and AutoTokenizer load."""
    to_llama(model).save_pretrained(directory)
    hugging_face_tokenizer(tokenizer_json).save_pretrained(directory)


def hugging_face_tokenizer(tokenizer_json: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer_class: Any = PreTrainedTokenizerFast  # untyped
    return tokenizer_class(tokenizer_file=str(tokenizer_json), eos_token=EOS, clean_up_tokenization_spaces=False)


def questions(count: int, seed: int) -> list[tuple[str, str]]:
    """(context, continuation) of generated questions: half have four sentences to choose from, half "yes" and "no"."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(2000)]
    requests = []
    for number in range(count):
        context = "Question: " + " ".join(rng.choices(words, k=rng.randint(10, 60))) + "\nAnswer:"
        if number % 2:
            requests += [(context, " no"), (context, " yes")]
        else:
            requests += [(context, " " + " ".join(rng.choices(words, k=rng.randint(3, 15)))) for _ in range(4)]
    return requests


def train_tokenizer(texts: Sequence[str], vocab_size: int, path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def compare(vocab_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both backends on one model: {"vocab_size", "requests", "ours", "hflm", "ratio", "low", "high",
    "largest_difference"}; ours and hflm are requests/s, low and high a 95 % interval of ours / hflm.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from lazypipe.stages.evaluate.benchmarks.harness import HarnessModel

    pairs = questions(options.questions, options.seed)
    instances = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ModelConfig(
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        max_seq_len=512,
    )
    model = Transformer(config, vocab_size, options.seed).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_json = Path(folder) / "tokenizer.json"
        train_tokenizer([context + continuation for context, continuation in pairs], TOKENIZER_SIZE, tokenizer_json)
        ours = HarnessModel(model, tokenizer_json, eos_id=0, batch_size=options.batch_size)
        theirs: Any = HFLM(
            pretrained=to_llama(model).to(device),
            tokenizer=hugging_face_tokenizer(tokenizer_json),
            batch_size=options.batch_size,
            max_length=config.max_seq_len,
        )
        backends: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours.loglikelihood(instances),
            "hflm": lambda: theirs.loglikelihood(instances, disable_tqdm=True),
        }
        answers = {name: run() for name, run in backends.items()}
        difference = max(abs(a[0] - b[0]) for a, b in zip(answers["ours"], answers["hflm"], strict=True))
        times = interleaved({name: timed(run, device) for name, run in backends.items()}, options.repeats)
    rates = {name: len(pairs) / times.median(name) for name in backends}
    ratio = times.ratio("hflm", "ours")  # of rates: the seconds the other way round
    return {
        "vocab_size": vocab_size,
        "requests": len(pairs),
        **rates,
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "largest_difference": difference,
    }


def check(options: argparse.Namespace) -> None:
    """UserError for the first value out of range."""
    smallest = dict.fromkeys(("num_layers", "num_heads", "questions", "batch_size", "repeats"), 1)
    check_at_least(options, **smallest, vocab_size=TOKENIZER_SIZE)
    width = 2 * options.num_heads
    if options.hidden_size < 1 or options.hidden_size % width:
        raise UserError(f"--hidden-size {options.hidden_size}: must be a multiple of twice --num-heads, {width}")
    check_writable("--json", options.json)


def main(arguments: Sequence[str]) -> int:
    """Print a row per vocabulary size; --json writes them to a file too."""
    parser = Parser("evaluate", __doc__)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[2048, 32000], help="of the model")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16, help="requests per forward pass, of both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    check(options)
    missing = [name for name in ("accelerate", "lm_eval") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"bench evaluate: {' and '.join(missing)} missing; install with  python -m pip install -c constraints.txt "
            '-e ".[test]"'
        )
    rows = []
    print(f"{'vocab':>7} {'requests':>9} {'ours/s':>9} {'HFLM/s':>9} {'ratio (95 %)':>17}  largest difference (nats)")
    for vocab_size in options.vocab_size:
        logging.disable(logging.WARNING)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                row = compare(vocab_size, options)
        finally:
            logging.disable(logging.NOTSET)
        rows.append(row)
        interval = f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})"
        print(
            f"{vocab_size:>7,} {row['requests']:>9,} {row['ours']:>9,.0f} {row['hflm']:>9,.0f} {interval:>17}  "
            f"{row['largest_difference']:.1e}",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
