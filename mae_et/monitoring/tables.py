"""Write tables as Markdown, CSV and LaTeX."""

import csv
import io
import re
from collections.abc import Iterator, Sequence

from mae_et.runtime.console import printable

_NUMBER = re.compile(r"([-+]?\d[\d.,:e+-]*( ± .*)?|nan|-?inf)?")
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that is also aligned as plain text, numbers to the right."""
    head, *rows = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in [head, *rows]]
    right = list(_are_numbers(head, rows))
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)]
    lines = [
        "| " + " | ".join(
            cell.rjust(width) if r else cell.ljust(width)
            for cell, width, r in zip(row, widths, right, strict=True)
        ) + " |"
        for row in (head, rule, *rows)
    ]  # fmt: skip
    return "\n".join(lines)


def latex_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a `tabular` of the package booktabs, numbers to the right."""
    columns = "".join("r" if right else "l" for right in _are_numbers(head, rows))
    first, *others = [" & ".join(map(_latex_cell, row)) + r" \\" for row in [head, *rows]]
    lines = [r"\toprule", first, r"\midrule", *others, r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *lines, r"\end{tabular}"])


def csv_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return comma-separated values; see `csv_cell`."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    is_number = re.compile(r"-?[\d.]+(e[-+]?\d+)?").fullmatch
    writer.writerows(
        [[cell if is_number(cell) else csv_cell(cell) for cell in row] for row in [head, *rows]]
    )
    return text.getvalue().rstrip("\n")


def csv_cell(text: str) -> str:
    """Escape control characters, and quote names that a spreadsheet would run as formulas."""
    return printable(f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text)


def _latex_cell(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in _one_line(text))


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _are_numbers(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[bool]:
    """Yield for each column whether it has rows, and only numbers and empty cells in them."""
    for _, *cells in zip(head, *rows, strict=True):
        yield bool(cells) and all(_NUMBER.fullmatch(" ".join(cell.split())) for cell in cells)
