"""The evaluate stage's Config: perplexity, continuations, extrapolation, probes and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from lazypipe.stages.config import Seed, StageConfig, operational
from lazypipe.stages.evaluate.benchmarks.suites import expand

SAME_TOKENS = 65_536  # of files that ask for `extrapolation.lengths` without a number of tokens


class ExtrapolationConfig(StageConfig):
    """Perplexity by context length; with `same_tokens` also by position, every length over the same tokens."""

    context_lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (64, 128, 256, 512),
        min_length=1,
        description="perplexity is measured at each, in tokens; beyond max_seq_len counts as extrapolation",
    )
    same_tokens: int | None = Field(
        None,
        gt=0,
        description="also score the first so many validation tokens at every length, the same ones, by position; null: "
        "only windows spread over the split",
    )
    stride: int | None = Field(
        None,
        gt=0,
        description="of `same_tokens`: also slide each window by so many tokens, scoring only what is new (at least "
        "length - stride of context); null: only windows side by side",
    )
    position_buckets: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (),
        description="of `same_tokens`: last positions of the position buckets; default: 1, 2, 4, 8, ... and the "
        "trained length",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.context_lengths)) < len(self.context_lengths):
            raise ValueError(
                f"context_lengths={list(self.context_lengths)} names something twice; leave the second away"
            )
        if sorted(set(self.position_buckets)) != list(self.position_buckets):
            raise ValueError(
                f"position_buckets={list(self.position_buckets)} does not increase; give the last position of each"
            )
        for name in ("stride", "position_buckets"):
            if getattr(self, name) and self.same_tokens is None:
                raise ValueError(
                    f"{name}={_written(getattr(self, name))} is of the tokens that every length scores; say how many "
                    f"with same_tokens, for example same_tokens: {SAME_TOKENS}, or remove it"
                )
        return self


def _written(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


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
    OLD_KEYS: ClassVar[Mapping[str, str]] = {
        "context_lengths": "extrapolation.context_lengths",
        "extrapolation.lengths": "extrapolation.context_lengths",
        "extrapolation.max_tokens": "extrapolation.same_tokens",
    }

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
    extrapolation: ExtrapolationConfig = Field(
        ExtrapolationConfig(), description="perplexity by context length and position"
    )
    probes: ProbesConfig = Field(ProbesConfig(), description="retrieval probes")

    @classmethod
    def with_new_keys(cls, fields: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
        """Make one list of `context_lengths` and `extrapolation.lengths`, which were two measures with a list each.

        The second was scored over the same `extrapolation.max_tokens` tokens at every length, the first never: files
        that ask for both get every number they got.
        """
        new = {key: value for key, value in fields.items() if key != "context_lengths"}
        extrapolation = fields.get("extrapolation", section.get("extrapolation", {}))
        if not isinstance(extrapolation, Mapping):
            return dict(fields)
        merged = {key: value for key, value in extrapolation.items() if key not in ("lengths", "max_tokens")}
        shared = (section.get("extrapolation") or {}).get("context_lengths")
        asked = fields.get("context_lengths", merged.get("context_lengths", shared))
        same = extrapolation.get("lengths")
        if same:
            if asked is None:
                asked = list(ExtrapolationConfig().context_lengths)
            both = isinstance(asked, list) and isinstance(same, list)
            asked = [*asked, *(length for length in same if length not in asked)] if both else same
            merged.setdefault("same_tokens", extrapolation.get("max_tokens", SAME_TOKENS))
        if isinstance(asked, list):
            asked = [length for number, length in enumerate(asked) if length not in asked[:number]]
        if asked is not None:
            merged["context_lengths"] = asked
        return new | {"extrapolation": merged}

    def window_lengths(self) -> list[tuple[str, int]]:
        """Every length of text that passes through the model at once, with the key that asks for it."""
        fields = {
            "extrapolation.context_lengths": self.extrapolation.context_lengths,
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
