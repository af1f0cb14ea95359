"""Tables of plain text cells as text, Markdown or HTML: each escapes for itself. `remarks` are lines to be read before any table."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from textwrap import fill
from typing import NamedTuple

from pgjax.pages.charts import printable, text
from pgjax.pages.page import table_of


class Table(NamedTuple):
    section: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str  # under the table: convention, failures, weights


def plain(remarks: Iterable[str], tables: Iterable[Table]) -> str:
    """For a terminal: columns aligned."""
    parts = [fill(_flat(line), 120) for line in remarks]
    for table in tables:
        lines = [[_flat(cell) for cell in line] for line in (table.columns, *table.rows)]
        wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pad = lambda line, wide=wide: [line[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(line[1:], wide[1:], strict=True))]  # noqa: E731
        parts.append("\n".join([_flat(table.title), *("  ".join(pad(line)).rstrip() for line in lines), fill(_flat(table.note), 120)]))
    return "\n\n".join(parts) + "\n"


def markdown(remarks: Iterable[str], tables: Iterable[Table]) -> str:
    """For a README, headings of the third level."""
    parts = [_marked(line) for line in remarks]
    for table in tables:
        head, *rows = ([_marked(cell) for cell in line] for line in (table.columns, *table.rows))
        lines = "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---", *["---:"] * (len(head) - 1)], *rows))
        parts.append(f"### {_marked(table.title)}\n\n{lines}\n\n{_marked(table.note)}")
    return "\n\n".join(parts) + "\n"


def markup(tables: Iterable[Table]) -> dict[str, str]:
    """HTML by section, for page.whole_page."""
    sections: dict[str, str] = {}
    for table in tables:
        rows = "".join(f"<tr>{''.join(f'<td>{_html(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
        part = f"<h3>{text(table.title)}</h3>{table_of(*map(text, table.columns), rows=rows)}<p>{text(table.note)}</p>"
        sections[table.section] = sections.get(table.section, "") + part
    return sections


def _flat(cell: str) -> str:
    return " ".join(printable(cell, 1000).split())


def _marked(cell: str) -> str:
    """Escaped for HTML and for Markdown, but for underscores, which mean nothing inside words."""
    return "".join(f"\\{c}" if c in "\\`*[]|~" else c for c in escape(_flat(cell), quote=False))


def _html(cell: str) -> str:
    return re.sub(r" (\([-\d.]+(?:–| to )[-\d.]+\))$", r" <small>\1</small>", text(cell, 200))
