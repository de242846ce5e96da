"""The benchmarks of the two papers, as lm-evaluation-harness names them. Needs no other module: configs.py uses it."""

from collections.abc import Iterable

SUITES: dict[str, tuple[str, ...]] = {
    # arXiv 2601.00919 (Lazy Attention)
    "lazy9": (
        "wikitext",
        "lambada_openai",
        "piqa",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "social_iqa",
        "boolq",
    ),
    # arXiv 2510.11602 (Deconstructing Attention)
    "deconstruct9": (
        "arc_easy",
        "boolq",
        "copa",
        "piqa",
        "sciq",
        "rte",
        "hellaswag",
        "wikitext",
        "lambada_openai",
    ),
}


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """The tasks of suites and tasks, in the order of their first mention, each once."""
    return tuple(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))
