"""The figures of the stages, each listed once: the report shows all that a variant's stages have drawn.

The figures by layer of the metrics that declare one (stages/metrics.py) come on top: every sparsity stage draws them of
its own model, and the report of all variants together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageFigure:
    """One figure of a stage.

    name      of its file, figures/<name>.png; * stands for a number (a layer), where there are several
    caption   text in its place, for whoever cannot see it; {} is that number
    together  the report draws it itself, of all variants, and shows no variant's own
    """

    name: str
    caption: str
    together: bool = False

    def files(self, folder: Path) -> Iterator[tuple[Path, str]]:
        """(file, caption) of those that are in the folder, by number."""
        if "*" not in self.name:
            if (folder / f"{self.name}.png").is_file():
                yield folder / f"{self.name}.png", self.caption
            return
        before, _, after = self.name.partition("*")
        numbers = [
            int(path.stem.removeprefix(before).removesuffix(after)) for path in folder.glob(f"{before}*{after}.png")
        ]
        for number in sorted(numbers):
            yield folder / f"{before}{number}{after}.png", self.caption.format(number)


EVALUATE: list[StageFigure] = []
SPARSITY: list[StageFigure] = []


def declare(stage: list[StageFigure], figure: StageFigure) -> StageFigure:
    """Add a figure to those of a stage; the report shows them in the order of declaration."""
    stage.append(figure)
    return figure


EXTRAPOLATION = declare(
    EVALUATE,
    StageFigure("extrapolation", "Perplexity by context length and loss by position", together=True),
)
PROBES = declare(
    EVALUATE,
    StageFigure("probes", "Accuracy and gain of the retrieval probes by length", together=True),
)
TAU_HEAT_MAP = declare(SPARSITY, StageFigure("tau_heat_map", "tau heat map"))
BIAS_CURVES = declare(SPARSITY, StageFigure("bias_curves", "bias curves"))
ATTENTION_LAYERS = declare(SPARSITY, StageFigure("attention_layer_*", "attention layer {}"))
