"""The table of answers on a page. What a guard or a person wrote is untrusted: it is escaped and bounded (charts.text), pictures are
decoded and drawn anew, and the page's own policy forbids scripts and anything from outside."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from pgjax.automaton import OUTCOMES
from pgjax.data.images import load_image
from pgjax.data.schema import ABSENT, LABELS
from pgjax.pages.charts import short, text
from pgjax.pages.page import table_of
from pgjax.taxonomy import Taxonomy

ROWS = 60  # for right and for wrong answers each
PIXELS = 160  # longer side of a picture


def thumbnail(data: bytes) -> str:
    image, out = load_image(data), io.BytesIO()
    image.thumbnail((PIXELS, PIXELS))
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def right(row: dict) -> bool:
    """Whether an answer is right in every part that the gold knows; one out of format is wrong."""
    verdict, terms = row["verdict"], row["terms"]
    expected = {"request": row["request_label"], "response": row["response_label"] if row["modality"] != "image" else "unknown"}
    expected["response"] = "safe" if expected["response"] == "absent" else expected["response"]
    labels = all(gold == "unknown" or LABELS[verdict[part]] == gold for part, gold in expected.items())
    by_id = terms["category_right"] > 0  # beside a name, ids may be right too
    category = {"node": by_id, "ood": by_id or terms["ood_detected"] > 0}.get(row["category"], True)
    return terms["format"] > 0 and labels and category


def top(node: str, taxonomy: Taxonomy) -> str:
    return taxonomy.by_id(node).parent or node


def said_class(row: dict, taxonomy: Taxonomy) -> str:
    """What the answer gave: top-level id, "none", "OOD" for a name of its own, "unlisted" for an id that the prompt lacks, "no parse"."""
    if not row["terms"]["format"]:
        return "no parse"
    if row["said"]:
        return top(row["said"], taxonomy)
    kind = OUTCOMES[row["verdict"]["kind"]]
    return {"none": "none", "id": "unlisted", "unlisted": "unlisted"}.get(kind, "OOD")


def wrong_and_right(samples: Sequence[dict]) -> dict[str, list[dict]]:
    return {"wrong": [row for row in samples if not right(row)], "right": [row for row in samples if right(row)]}


def sample_tables(
    parts: Mapping[str, Sequence[dict]], taxonomy: Taxonomy, pictures: Mapping[str, Sequence[str]], content: bool, veil: bool
) -> str:
    """Rows as evaluation/samples.py makes them, at most ROWS a part. `pictures` has data addresses by row id; without `content` texts
    stay out, and with `veil` they are folded and pictures blurred until clicked."""
    scored, body = any("score_request" in row for rows in parts.values() for row in rows), ""
    for name, rows in parts.items():
        if rows:
            more = f", the first {ROWS}" if len(rows) > ROWS else ""
            rows_html = "".join(sample_row(row, taxonomy, pictures.get(row["id"], []), content, veil, scored) for row in rows[:ROWS])
            columns = ("id", "modality", "gold", "verdict", *["p(unsafe)"] * scored, "reward", "terms", "tokens")
            table = table_of(*columns, rows=rows_html, kind="samples")
            body += f'<details id="{name}" open><summary>{name.capitalize()}: {len(rows)}{more}</summary>{table}</details>'
    return body


def sample_row(row: dict, taxonomy: Taxonomy, pictures: Sequence[str], content: bool, veil: bool, scored: bool) -> str:
    verdict, terms = row["verdict"], row["terms"]
    gold_name = {"node": row["node"], "ood": f"OOD ({row['node'] or '?'}{', never seen' if row['never_seen'] else ''})"}
    gold = [row["request_label"], row["response_label"], gold_name.get(row["category"], row["category"])]
    said = said_class(row, taxonomy)
    answer = [LABELS[verdict["request"]], LABELS[verdict["response"]], row["said"] or said]
    scores = " · ".join(short(row[key]) for key in ("score_request", "score_response") if row.get(key) is not None)
    cells = [
        f'<td class="id">{text(row["id"], 80)}</td><td>{text(row["modality"].replace("_", " with "))}</td>',
        f"<td>{labels(gold)}</td><td>{labels(answer) if verdict['parsed'] else 'no parse'}</td>" + f"<td>{scores}</td>" * scored,
        f"<td>{short(row['reward'])}</td><td>{' + '.join(short(terms[name]) for name in ('request', 'response', 'category'))}</td>",
        f"<td>{row['length']}</td>",
    ]
    line = f'<tr class="{"ok" if right(row) else "no"}">{"".join(cells)}</tr>'
    texts = {name: row[name] for name in ("request", "response", "answer") if row.get(name)} if content else {}
    return line + content_row(texts, pictures, veil, 9)


def content_row(texts: Mapping[str, str], pictures: Sequence[str], veil: bool, columns: int) -> str:
    """Texts by name, and pictures as data addresses, across a table; with `veil` folded and blurred until clicked. "" for nothing."""
    if not texts and not pictures:
        return ""
    line_end = lambda markup: markup.replace("\n", " <i>↵</i> ")  # noqa: E731
    shown = "".join(f'<div><b>{text(name)}</b> <span dir="auto">{line_end(text(value))}</span></div>' for name, value in texts.items())
    images = [f'<img src="{escape(address)}" alt="">' for address in pictures]
    if veil:
        images = [f'<label class="veil" title="click to see"><input type="checkbox">{image}</label>' for image in images]
        shown = f"<details><summary>text</summary>{shown}</details>" if shown else ""
    return f'<tr class="content"><td colspan="{columns}"><div class="both">{"".join(images)}<div>{shown}</div></div></td></tr>'


def labels(parts: list[str]) -> str:
    return " · ".join(f'<span class="{text(part)}">{text(part)}</span>' for part in parts if part != LABELS[ABSENT])
