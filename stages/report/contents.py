"""What report.json holds: the comparison, what is said of it, and where its results are from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lazypipe.stages.report.comparison import Comparison
from lazypipe.stages.report.rows import VariantRow
from lazypipe.stages.report.sections import Origin
from lazypipe.stages.report.seeds import SeedTable


@dataclass(frozen=True)
class Finding:
    """One sentence on the results, under its topic."""

    topic: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """reference: the variant that the others are compared with. columns: keys of the table (table.py), in its order.

    seeds, published: None unless there are several seeds, and a comparison is asked for.
    """

    title: str
    reference: str
    columns: list[str]
    rows: list[VariantRow]
    unigram_entropy: float | None
    seeds: SeedTable | None = None
    published: Comparison | None = None
    findings: tuple[Finding, ...] = ()
    provenance: tuple[Origin, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "reference": self.reference,
            "columns": self.columns,
            "rows": [row.to_json() for row in self.rows],
            "unigram_entropy": self.unigram_entropy,
            "seeds": None if self.seeds is None else asdict(self.seeds),
            "published": None if self.published is None else asdict(self.published),
            "findings": [asdict(finding) for finding in self.findings],
            "provenance": [asdict(origin) for origin in self.provenance],
        }
