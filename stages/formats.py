"""How the numbers of tables, figures and reports are written."""

from __future__ import annotations


def loss(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def perplexity(value: float) -> str:
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.2g}"


def share(value: float) -> str:
    """0 ... 1 as per cent. Only an exact 0 is written as 0, and only an exact 1 as 100."""
    if value in (0.0, 1.0):
        return f"{100 * value:.0f} %"
    if abs(value) < 0.0005:
        return "<0.1 %"
    return ">99.9 %" if 0.9995 <= value < 1 else f"{100 * value:.1f} %"


def small(value: float) -> str:
    """A number around 0 ... 1 with three significant digits, or four decimals."""
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4f}"


def threshold(value: float) -> str:
    """tau: around -1, or as a constant threshold around -1 / length."""
    return f"{value:.3f}" if abs(value) >= 0.05 else f"{value:.2g}"


def count(value: float) -> str:
    return f"{value:,.0f}"
