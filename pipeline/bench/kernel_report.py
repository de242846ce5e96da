"""The benchmark's table and plot."""

from pathlib import Path
from typing import Any

COLUMNS = (
    *("mode", "L", "D", "W", "steep", "rho", "implementation", "ms", "vs sdpa", "95 %", "TFLOP/s", "of matmul"),
    "extra MB",
)


def rows(record: dict[str, Any]) -> list[list[str]]:
    """One row of text per result, ratios against the fastest softmax (sdpa*) of the same case."""
    table = []
    for r in record["results"]:
        row = [r["mode"], str(r["length"]), str(r["head_dim"]), str(r["window"]), f"{r['steep_share']:.2f}"]
        row += [f"{r['rho']:.2f}" if "rho" in r else "", r["peer"]]
        if "ms" not in r:
            table.append([*row, "skipped: " + r["skipped"], "", "", "", "", ""])
            continue
        memory = r.get("extra_mb")
        ratio = r.get("vs_sdpa")
        row += [f"{r['ms']:.2f}"]
        row += [f"{ratio['median']:.2f}", f"{ratio['low']:.2f}-{ratio['high']:.2f}"] if ratio else ["", ""]
        row += [f"{r['tflops']:.3f}", f"{r['tflops'] / record['matmul_tflops']:.0%}"]
        table.append([*row, "" if memory is None else f"{memory:.0f}"])
    return table


def format_table(record: dict[str, Any]) -> str:
    """A Markdown table under one line that says where it was taken."""
    where = ", ".join(f"{key} {value}" for key, value in record["environment"].items())
    lines = [f"{where}; matrix product bound {record['matmul_tflops']:.3f} TFLOP/s", ""]
    body = [list(COLUMNS), *rows(record)]
    widths = [max(len(row[i]) for row in body) for i in range(len(COLUMNS))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in body]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines + text)


def write_plot(record: dict[str, Any], path: Path) -> None:
    """Time against length, one panel per mode and density. Raises ImportError naming matplotlib when it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs matplotlib; install it or leave --plot out") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(r["mode"], r["steep_share"]) for r in record["results"]})
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False, layout="constrained")
    for axis, (mode, share) in zip(axes[0], panels, strict=True):
        timed = [r for r in record["results"] if (r["mode"], r["steep_share"]) == (mode, share) and "ms" in r]
        for peer in sorted({r["peer"] for r in timed}):
            points = sorted((r["length"], r["ms"]) for r in timed if r["peer"] == peer)
            axis.loglog(*zip(*points, strict=True), marker="o", label=peer)
        axis.set(title=f"{mode}, {share:.0%} local heads", xlabel="sequence length", ylabel="ms")
        axis.legend(fontsize=7)
    figure.savefig(path)
    plt.close(figure)
