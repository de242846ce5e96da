"""docs/configuration.md says what the code says."""

from pathlib import Path

from lazypipe.pipeline.experiment.reference import reference


def test_the_page_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == "\n".join(reference()).rstrip() + "\n", (
        "run: python -m lazypipe.pipeline.experiment.reference > docs/configuration.md"
    )


def test_every_field_is_described() -> None:
    undescribed = [line for line in "\n".join(reference()).splitlines() if line.startswith("| `") and "| None" in line]
    assert undescribed == []
