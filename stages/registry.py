"""The table of stages: one row each, and the order they run in. Imports no torch.

Adding a stage: its folder with its Config and its function, and a row here. Nothing else knows a stage by name.
"""

from __future__ import annotations

from collections.abc import Iterable

from lazypipe.model.config import ModelConfig
from lazypipe.stages.config import StageConfig
from lazypipe.stages.contract import UserError
from lazypipe.stages.data.sources import EmbeddedSource, FilesSource, HubSource
from lazypipe.stages.evaluate import planning as evaluation
from lazypipe.stages.evaluate.benchmarks.tasks import pin_tasks, tasks_identity
from lazypipe.stages.evaluate.config import EvaluateConfig, ExtrapolationConfig, ProbesConfig
from lazypipe.stages.facts import EvaluateFacts, PretrainFacts, ReportFacts, SparsityFacts, TokenizeFacts
from lazypipe.stages.pretrain import planning as pretraining
from lazypipe.stages.pretrain.config import PretrainConfig
from lazypipe.stages.report.config import ReportConfig
from lazypipe.stages.sparsity import planning as analysis
from lazypipe.stages.sparsity.config import SparsityConfig
from lazypipe.stages.stage_row import CorpusPlanning, ModelPlanning, Section, StageRow
from lazypipe.stages.tokenization import planning as tokenization
from lazypipe.stages.tokenization.config import FileTokenizer, Filters, HubTokenizer, TokenizeConfig, TrainTokenizer
from lazypipe.stages.tokenization.identity import pin, source_identity

TOKENIZE = StageRow(
    name="tokenize",
    description="tokenization",
    function="lazypipe.stages.tokenization.stage:run",
    config=TokenizeConfig,
    facts=TokenizeFacts,
    per_variant=False,
    corpus=CorpusPlanning(check=tokenization.check_corpus, vocabulary=tokenization.vocabulary),
    absolute_paths=tokenization.make_paths_absolute,
    sections=(
        Section("tokenize", TokenizeConfig, "Text in, token shards out."),
        Section("tokenize.source, kind: embedded", EmbeddedSource, ""),
        Section("tokenize.source, kind: files", FilesSource, "Relative paths are taken from the working directory."),
        Section("tokenize.source, kind: hub", HubSource, ""),
        Section("tokenize.tokenizer, kind: train", TrainTokenizer, ""),
        Section("tokenize.tokenizer, kind: file", FileTokenizer, ""),
        Section("tokenize.tokenizer, kind: hub", HubTokenizer, ""),
        Section(
            "tokenize.filters",
            Filters,
            "Counts of what is left out are metrics, facts, and columns of tables/sources: docs/tokenization.md.",
        ),
    ),
    pin=pin,
    source_identity=source_identity,
    local_files=tokenization.local_files,
    disk_bytes=tokenization.disk_bytes,
    whole_machine=True,
    check_publish="lazypipe.stages.tokenization.upload:check_publish",
    publish="lazypipe.stages.tokenization.upload:publish",
    corpus_role="tokenized",
    headline=("train_tokens",),
)

PRETRAIN = StageRow(
    name="pretrain",
    description="pretraining",
    function="lazypipe.stages.pretrain.stage:run",
    config=PretrainConfig,
    facts=PretrainFacts,
    inputs=("tokenize",),
    models=ModelPlanning(model=pretraining.model, costs=pretraining.costs),
    from_experiment={"seed": "seed"},
    in_variant="flat",
    sections=(
        Section(
            "model",
            ModelConfig,
            "A pre-norm decoder: RMSNorm, SwiGLU, RoPE. `lazypipe variants` lists mixers and patterns.",
        ),
        Section("pretrain", PretrainConfig, "AdamW; what a step does: docs/pretraining.md."),
    ),
    windows=pretraining.windows,
    disk_bytes=pretraining.disk_bytes,
    uses_torch=True,
    whole_machine=True,
    on_workers=True,
    prepare_worker="lazypipe.stages.pretrain.determinism:prepare_worker",
    baselines_need_gpus=True,
    saves_on_stop=True,
    resumes=pretraining.resumes,
    corpus_role="training",
    watch_machine=True,
    headline=("validation_loss", "tokens_per_s"),
)

EVALUATE = StageRow(
    name="evaluate",
    description="evaluation",
    function="lazypipe.stages.evaluate.stage:run",
    config=EvaluateConfig,
    facts=EvaluateFacts,
    inputs=("tokenize", "pretrain"),
    from_experiment={"seed": "seed"},
    in_variant="nested",
    absolute_paths=evaluation.make_paths_absolute,
    adapt=evaluation.keep_ablations_of_hybrids,
    model_lengths=evaluation.model_lengths,
    sections=(
        Section("evaluate", EvaluateConfig, "Held-out loss, continuations, and benchmarks (docs/evaluation.md)."),
        Section(
            "evaluate.extrapolation", ExtrapolationConfig, "Perplexity by context length and position: docs/probes.md."
        ),
        Section("evaluate.probes", ProbesConfig, "Retrieval probes: docs/probes.md."),
    ),
    pin=pin_tasks,
    source_identity=tasks_identity,
    local_files=evaluation.local_files,
    windows=evaluation.windows,
    uses_torch=True,
    baselines_need_gpus=True,
    resumes=evaluation.resumes,
    maps_with_own_resources=True,
    map_workers=evaluation.map_workers,
    map_workers_key="task_workers",
    corpus_role="evaluation",
    headline=("validation_loss", "perplexity"),
)

SPARSITY = StageRow(
    name="sparsity",
    description="attention analysis",
    function="lazypipe.stages.sparsity.stage:run",
    config=SparsityConfig,
    facts=SparsityFacts,
    inputs=("tokenize", "pretrain"),
    model_lengths=analysis.model_lengths,
    sections=(Section("sparsity", SparsityConfig, "The attention weights on held-out text."),),
    windows=analysis.windows,
    uses_torch=True,
    corpus_role="evaluation",
    headline=("sparsity",),
)

REPORT = StageRow(
    name="report",
    description="the report",
    function="lazypipe.stages.report.stage:run",
    config=ReportConfig,
    facts=ReportFacts,
    inputs=("tokenize", "pretrain", "evaluate", "sparsity"),
    per_variant=False,
    makes_report=True,
    from_experiment={"title": "name"},
    sections=(Section("report", ReportConfig, "The page that sets all variants side by side."),),
)


def in_order(rows: Iterable[StageRow]) -> tuple[StageRow, ...]:
    """The rows, each behind its inputs; UserError for an input that no row makes, or for rows in a circle."""
    waiting = {row.name: row for row in rows}
    for row in waiting.values():
        for name in row.inputs:
            if name not in waiting:
                raise UserError(f"stage {row.name}: its input {name!r} is no stage; there are {', '.join(waiting)}")
    ordered: list[StageRow] = []
    while waiting:
        ready = next((row for row in waiting.values() if not waiting.keys() & set(row.inputs)), None)
        if ready is None:
            raise UserError(f"the stages {', '.join(waiting)} wait for each other; remove one of their inputs")
        ordered.append(waiting.pop(ready.name))
    return tuple(ordered)


STAGES = in_order((TOKENIZE, PRETRAIN, EVALUATE, SPARSITY, REPORT))
STAGE_CONFIGS: dict[str, type[StageConfig]] = {row.name: row.config for row in STAGES}


def stage_row(name: str) -> StageRow:
    """The row of a stage; KeyError for an unknown name."""
    return {row.name: row for row in STAGES}[name]
