"""A report as one Markdown page and as one self-contained HTML page made from it.

Markdown is the source: templates/report.md.j2 is filled, then converted to HTML with every figure embedded as a data
URI. Whatever a user or a model wrote (titles, paths, prompts, continuations) passes through `inline` or `literal`, so
it is shown and never interpreted.
"""

from __future__ import annotations

import base64
import html
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor

from lazypipe.stages.figures.listed import EXTRAPOLATION, PROBES
from lazypipe.stages.formats import loss, perplexity
from lazypipe.stages.report.contents import Report
from lazypipe.stages.report.table import best_rows, cell, columns_of, unigram_row

TEMPLATES = Path(__file__).parent / "templates"
# Characters that turn the direction of the text around them, and line breaks HTML does not know.
CONTROLS = frozenset("\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
ENTITIES = {ord(character): f"&#{ord(character)};" for character in "&<>\\`|~$!#"}
BACKSLASHED = {ord(character): "\\" + character for character in "_*[]"}


def markdown_page(report: Report, sections: Mapping[str, Any]) -> str:
    """report.md: `report` is what report.json is made from, `sections` what only the page shows (figures, texts)."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,  # this is Markdown: `inline` and `literal` escape what is not ours
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"inline": inline, "literal": literal, "perplexity": perplexity, "loss": loss}
    drawn = {"extrapolation_figure": EXTRAPOLATION, "probes_figure": PROBES}
    template = environment.get_template("report.md.j2")
    return template.render(report=report, table=comparison_table(report), **drawn, **sections)


def html_page(markdown_text: str, title: str, folder: Path) -> str:
    """report.html: the Markdown page with its figures, which are files below `folder`, embedded."""
    converter = Markdown(extensions=["tables", EmbeddedFigures(folder)], output_format="html")
    body = converter.convert(markdown_text)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(title=visible(title), body=body)


def comparison_table(report: Report) -> str:
    """The table of all variants in Markdown; the best value of a column is bold, the unigram yardstick comes last."""
    columns = columns_of(report.columns, report.reference)
    rows = report.rows
    lines = ["| " + " | ".join(inline(column.heading) for column in columns) + " |"]
    lines.append("|" + "|".join("---:" if column.write is not str else "---" for column in columns) + "|")
    best = {column.key: best_rows(column, rows) for column in columns}
    for index, row in enumerate(rows):
        cells = [inline(cell(column, row)) for column in columns]
        marked = [
            f"**{text}**" if index in best[column.key] else text for column, text in zip(columns, cells, strict=True)
        ]
        lines.append("| " + " | ".join(marked) + " |")
    if report.unigram_entropy is not None:
        yardstick = unigram_row(report.unigram_entropy)
        lines.append("| " + " | ".join(inline(cell(column, yardstick)) for column in columns) + " |")
    return "\n".join(lines)


def inline(text: object) -> str:
    """Text as it stands, for a line of Markdown or a table cell: markup, HTML and line breaks lose their meaning."""
    return " ".join(visible(str(text)).split()).translate(ENTITIES | BACKSLASHED)


def literal(text: object) -> str:
    """Text as it stands, for the inside of a `<pre>` element."""
    return html.escape(visible(str(text)))


def visible(text: str) -> str:
    r"""Control characters, lone surrogates and direction overrides as \x1b, \ud800, \u202e; tabs as spaces."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if (unicodedata.category(character) in ("Cc", "Cs") and character != "\n") or character in CONTROLS
        else character
        for character in text.replace("\r\n", "\n").expandtabs(4)
    )


class EmbeddedFigures(Extension):
    """Markdown extension: replaces the address of every figure by its content."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  (the library's name)
        md.treeprocessors.register(_EmbedFigures(md, self.folder), "embedded_figures", 0)


class _EmbedFigures(Treeprocessor):
    def __init__(self, md: Markdown, folder: Path) -> None:
        super().__init__(md)
        self.folder = folder

    def run(self, root: Element) -> None:
        for image in root.iter("img"):
            content = (self.folder / image.get("src", "")).read_bytes()
            # One text size in all figures: they are drawn at 150 dots per inch, a CSS inch has 96 pixels. The width of
            # a PNG stands in bytes 16 to 19.
            image.set("width", str(int.from_bytes(content[16:20], "big") * 96 // 150))
            image.set("src", "data:image/png;base64," + base64.b64encode(content).decode("ascii"))
