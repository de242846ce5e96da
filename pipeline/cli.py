"""The command line. Parses, calls one function per command, and turns a UserError into `error: ...` and exit code 2."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from lazypipe.stages.contract import OldKeyWarning, UserError

app = typer.Typer(
    name="lazypipe",
    help="Attention experiments from one YAML file: tokenize, pretrain, evaluate, analyse, report - on Ray, in MLflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="experiment file (YAML)")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="overrides such as pretrain.lr=1e-3; ~key deletes"),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="STAGE[/VARIANT]", help="this stage and what it needs that is not stored"),
]
FromOption = Annotated[
    list[str] | None,
    typer.Option("--from", metavar="STAGE[/VARIANT]", help="recompute this stage and everything below it"),
]
ForceOption = Annotated[
    list[str] | None,
    typer.Option("--force", metavar="STAGE[/VARIANT]", help="a new generation of it, and of everything below it"),
]
RootOption = Annotated[
    str | None, typer.Option("--root", metavar="DIR", help="where everything is written (LAZYPIPE_HOME goes first)")
]
LocalOption = Annotated[bool, typer.Option("--local", help="the same DAG in one process, without Ray")]
AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="A", help="join this Ray cluster instead of starting one")
]
NoWaitOption = Annotated[bool, typer.Option("--no-wait", help="refuse instead of waiting for a run at the same stage")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]


def console() -> Console:
    width = None if sys.stdout.isatty() else 140
    return Console(width=width)


@app.command()
def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    only: OnlyOption = None,
    start: FromOption = None,
    force: ForceOption = None,
    local: LocalOption = False,
    root: RootOption = None,
    address: AddressOption = None,
    no_wait: NoWaitOption = False,
) -> None:
    """Run an experiment: whatever is not stored yet, and what depends on it."""
    from lazypipe.pipeline.execution.run import RunOptions, run_experiment
    from lazypipe.pipeline.experiment.schema import load_experiment
    from lazypipe.pipeline.planning.plan import Selection

    if local and address is not None:
        raise UserError("--local and --address exclude each other: one process without Ray, or a Ray cluster")
    experiment = load_experiment(config, overrides or ())
    options = RunOptions(
        Selection(tuple(only or ()), tuple(start or ()), tuple(force or ())), local, root, address, wait=not no_wait
    )
    raise typer.Exit(run_experiment(experiment, options, console()))


@app.command()
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    only: OnlyOption = None,
    start: FromOption = None,
    force: ForceOption = None,
    root: RootOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="say which field changed, against the nearest run")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="check the sha256 of every stored file")] = False,
    as_json: JsonOption = False,
    printed: Annotated[
        str | None,
        typer.Option("--print", metavar="STAGE[/VARIANT]", help="only print its resolved config, as JSON"),
    ] = None,
) -> None:
    """What would run, what is cached, and why. Computes nothing, writes nothing but a cache of file hashes."""
    from lazypipe.pipeline.commands.status import print_config, show_plan
    from lazypipe.pipeline.experiment.schema import load_experiment
    from lazypipe.pipeline.planning.plan import Selection

    if printed is not None:
        print_config(load_experiment(config, overrides or ()), printed)
        return
    selection = Selection(tuple(only or ()), tuple(start or ()), tuple(force or ()))
    show_plan(load_experiment(config, overrides or ()), root, selection, explain, verify, as_json, console())


@app.command()
def rerun(
    run_id: Annotated[str, typer.Argument(metavar="MLFLOW_RUN_ID", help="a run of an experiment or of a stage")],
    overrides: OverridesArgument = None,
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="STAGE[/VARIANT]", help="recompute this one (default: the run's own stage)"),
    ] = None,
    local: LocalOption = False,
    root: RootOption = None,
    address: AddressOption = None,
    no_wait: NoWaitOption = False,
) -> None:
    """Recompute a stage of an earlier run, or all of them; the experiment comes from the run, not from a local file."""
    from lazypipe.pipeline.commands.rerun import experiment_of_run
    from lazypipe.pipeline.execution.run import RunOptions, run_experiment
    from lazypipe.pipeline.experiment.schema import compose, resolve_root
    from lazypipe.pipeline.planning.plan import Selection
    from lazypipe.pipeline.tracking.uri import probe, tracking_uri
    from lazypipe.stages.overrides import apply_overrides

    uri = tracking_uri(resolve_root(None, root))
    probe(uri)
    document, node_id, run_root = experiment_of_run(uri, run_id)
    experiment = compose(apply_overrides(document, overrides or ()))
    first = tuple(row.name for row in experiment.rows if not row.inputs)
    force = tuple(stage or ()) or ((node_id,) if node_id else first)
    options = RunOptions(
        Selection(force=force),
        local,
        root or str(run_root),
        address,
        wait=not no_wait,
        rerun_of=run_id,
        command="lazypipe rerun",
    )
    raise typer.Exit(run_experiment(experiment, options, console()))


@app.command()
def status(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="only the stages of this experiment")
    ] = None,
    overrides: OverridesArgument = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """What is stored, running or interrupted below the root."""
    from lazypipe.pipeline.commands.status import show_status

    show_status(config, overrides or (), root, as_json, console())


@app.command()
def submit(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    address: Annotated[
        str, typer.Option("--address", metavar="URL", help="Ray dashboard, e.g. http://127.0.0.1:8265")
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", help="stream the job's log and return its exit code")] = False,
    root: RootOption = None,
) -> None:
    """Run an experiment as a job on a Ray cluster; the driver lives there and survives this command."""
    from lazypipe.pipeline.cluster.submit import submit_job

    raise typer.Exit(submit_job(config, overrides or (), address, follow, root, console()))


@app.command()
def ui(
    root: RootOption = None,
    host: Annotated[str, typer.Option(help="interface to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 5000,
) -> None:
    """Open the MLflow UI on what is stored below the root."""
    from lazypipe.pipeline.tracking.ui import serve_ui

    raise typer.Exit(serve_ui(root, host, port))


@app.command()
def doctor(root: RootOption = None, as_json: JsonOption = False) -> None:
    """Check this machine: versions, torch build, GPUs, corpus, disk, tracking."""
    from lazypipe.pipeline.commands.doctor import diagnose

    raise typer.Exit(diagnose(root, as_json, console()))


@app.command()
def variants(
    as_json: JsonOption = False,
    sizes: Annotated[bool, typer.Option("--sizes", help="the papers' model sizes and their parameter counts")] = False,
) -> None:
    """The attention mechanisms and layer patterns an experiment file can name; with --sizes the papers' models."""
    from lazypipe.model.mixers.registry import BASELINES, MIXERS
    from lazypipe.model.pattern import PATTERNS

    if sizes:
        from lazypipe.pipeline.planning.costs import show_sizes

        show_sizes(as_json, console())
        return
    if as_json:
        mixers, baselines = ({name: row.summary for name, row in rows.items()} for rows in (MIXERS, BASELINES))
        print(json.dumps({"mixers": mixers, "patterns": PATTERNS, "baselines": baselines}, indent=1))
        return
    print("mixer: what takes the place of attention")
    for name, row in MIXERS.items():
        print(f"  {name:<14} {row.summary}")
    print("pattern: which layers keep standard attention (or a list of layers, counted from 1)")
    for name, description in PATTERNS.items():
        print(f"  {name:<14} {description}")
    print("mixer, too: whole models of flash-linear-attention, on CUDA, with the extra `baselines`")
    for name, row in BASELINES.items():
        print(f"  {name:<22} {row.summary}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="checkpoint folder, or an experiment file")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="folder to write, new or empty")],
    overrides: OverridesArgument = None,
    variant: Annotated[str | None, typer.Option("--variant", help="which variant of the experiment file")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export in TARGET")] = False,
    root: RootOption = None,
) -> None:
    """Write a trained model as a Hugging Face folder that loads without this project."""
    from lazypipe.pipeline.commands.export import run_export

    run_export(source, target, variant, overrides or (), root, force, console())


@app.command()
def generate(
    target: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT|CONFIG", help="checkpoint folder, or experiment file with --variant")
    ],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="texts to continue")] = None,
    variant: Annotated[str | None, typer.Option("--variant", help="which of the experiment's models")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="key=value", help="override of the experiment file")
    ] = None,
    root: RootOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="length of a continuation at most, in tokens")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, above 0 samples")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="sample among the k likeliest tokens (default: all)")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="sample among the fewest tokens that have probability p together")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of sampling; sample j is drawn with seed + j")] = 0,
    num_samples: Annotated[int, typer.Option(help="continuations of each prompt")] = 1,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="more prompts, one per line; - is standard input")
    ] = None,
    unprompted: Annotated[bool, typer.Option("--unprompted", help="begin a document instead")] = False,
    as_json: JsonOption = False,
) -> None:
    """Let a trained model continue texts; one alone is printed as it comes."""
    from lazypipe.pipeline.commands.generate import Sampling, generate_command, read_prompts

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, num_samples)
    texts = read_prompts(prompts or (), prompt_file, unprompted)
    generate_command(target, variant, overrides or (), root, texts, sampling, as_json)


BENCHMARKS = {  # name: (its module in lazypipe.pipeline.bench, what it times); each has main(arguments) -> exit code
    "kernels": ("kernels", "Lazy Attention's kernels against softmax attention: time, TFLOP/s, memory"),
    "tokenize": ("tokenization", "tokenization against raw `tokenizers` and datasets.map; --memory for its peak"),
    "pretrain": ("pretrain", "the training loop against a bare PyTorch loop and transformers.Trainer"),
    "loss": ("loss", "logits formed in chunks against full logits and torch's linear_cross_entropy"),
    "checkpoint": ("checkpoint", "what a resume checkpoint costs training, at once and in the background"),
    "reduction": ("reduction", "gradients summed in the order of the micro-batches against an all-reduce"),
    "generate": ("generate", "decoding with the cache and without"),
    "evaluate": ("evaluate", "benchmark requests against the harness's own Hugging Face backend"),
}


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="WHAT", help=", ".join(BENCHMARKS))],
) -> None:
    """Time one of them against others; `bench WHAT --help` lists the options."""
    from lazypipe.stages.contract import nearest

    if what in ("--help", "-h"):
        print("Usage: lazypipe bench WHAT [OPTIONS]; lazypipe bench WHAT --help lists the options of one")
        for name, (_, description) in BENCHMARKS.items():
            print(f"  {name:<11} {description}")
        return
    if what not in BENCHMARKS:
        raise UserError(f"bench {what}: there is no such benchmark{nearest(what, list(BENCHMARKS))}")
    module, _ = BENCHMARKS[what]
    raise typer.Exit(importlib.import_module(f"lazypipe.pipeline.bench.{module}").main(context.args))


def _format_warning(python_format: Callable[..., str], message: Any, category: Any, *place: Any, **line: Any) -> str:
    """As Python does, but hints on old keys are one plain line."""
    if issubclass(category, OldKeyWarning):
        return f"hint: {message}\n"
    return python_format(message, category, *place, **line)


def main() -> NoReturn:
    """Entry point of `lazypipe` and `python -m lazypipe`."""
    warnings.formatwarning = functools.partial(_format_warning, warnings.formatwarning)
    try:
        app()
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
