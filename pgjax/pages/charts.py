"""Charts as SVG text: lines, bars, histogram, heat map, reliability. Colours and fonts are the page's (classes of page.py's style sheet).

Titles and labels are escaped here; numbers that are None or not finite leave a gap.
"""

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float | None]]

W, H = 420, 210  # of a plot, in SVG units; the page scales it
LEFT, TOP, BOTTOM = 44, 22, 34  # margins
LETTER = 7.2  # width of a letter, on the safe side
WINDOW = 10  # steps of a running mean


def text(value: object, longest: int = 4000) -> str:
    """`printable`, and escaped for HTML."""
    return escape(printable(value, longest))


def printable(value: object, longest: int = 4000) -> str:
    """Control, invisible and direction-changing characters become U+FFFD, and what is too long is cut."""
    shown = str(value)
    cut = shown[:longest] + " [cut]" * (len(shown) > longest)
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in cut)


def short(value: float | None) -> str:
    """A number in about three digits."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 1e5 or 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`, both ends covered."""
    raw = (high - low) / most
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first, last = math.floor(low / step + 0.02), math.ceil(high / step - 0.02)  # a hair over an end is not worth a tick
    return [round(n * step, 12) for n in range(first, last + 1)]


def figure(title: str, body: str, width: int = W, height: int = H, kind: str = "") -> str:
    """A captioned SVG; `body` is markup."""
    return (
        f'<figure class="{kind}"><figcaption>{text(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(title)}">{body}</svg></figure>'
    )


def label(x: float, y: float, value: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{text(value, 60)}</text>'


def cut(name: str, longest: int) -> str:
    return name if len(name) <= longest else name[: longest - 1].rstrip() + "…"


def line(x0: float, y0: float, x1: float, y1: float, kind: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>'


def known(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def running_mean(points: Sequence[tuple[float, float]], window: int = WINDOW) -> list[tuple[float, float]]:
    """Mean of each point and those before it, `window` in all; fewer at the start."""
    parts = [points[max(0, i + 1 - window) : i + 1] for i in range(len(points))]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def lines(title: str, series: Mapping[str, Points], y_label: str, high: float = 0) -> str:
    """Curves over steps, each labelled at its end with its last value; long ones faint, with their running mean on top.

    The y axis shows at least 0 and `high`. A chart without a number is "".
    """
    drawn = {name: known(points) for name, points in series.items() if known(points)}
    if not drawn:
        return ""
    values = [0, high, *(y for points in drawn.values() for _, y in points)]
    y_ticks = ticks(min(values), max(values) if any(values) else 1)
    main = {name: running_mean(points) if len(points) >= 3 * WINDOW else points for name, points in drawn.items()}
    named = {name: short(points[-1][1]) + f" {name}" * (len(main) > 1) for name, points in main.items()}
    right = W - 14 - LETTER * max(map(len, named.values()))
    first, last = min(p[0][0] for p in drawn.values()), max(p[-1][0] for p in drawn.values())
    x_ticks = [t for t in ticks(first, max(last, first + 1), 4) if first <= t <= last and t == int(t)]
    x_at = lambda x: LEFT + (x - first) / max(last - first, 1) * (right - LEFT)  # noqa: E731
    y_at = height(y_ticks)
    body = frame(y_ticks, right, y_label, "step")
    body += [line(x_at(t), H - BOTTOM, x_at(t), H - BOTTOM + 4, "axis") for t in x_ticks]
    body += [label(x_at(t), H - BOTTOM + 16, f"{t:g}", "middle") for t in x_ticks]
    path = lambda points: " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)  # noqa: E731
    ends = []
    for number, (name, points) in enumerate(drawn.items()):
        hue = f"hue{number % 5}"
        if main[name] is not points:
            body.append(f'<polyline points="{path(points)}" class="curve faint {hue}"/>')
        body.append(f'<polyline points="{path(main[name])}" class="curve {hue}"/>')
        if len(points) <= 15:
            body += [f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="2.6" class="dot {hue}"/>' for x, y in points]
        ends.append((y_at(main[name][-1][1]), named[name], f"dot {hue}"))
    return figure(title, "".join(body) + "".join(label(right + 7, y + 4, name, hue) for y, name, hue in apart(ends)))


def height(y_ticks: list[float]) -> Callable[[float], float]:
    """Where a value stands in a plot whose y axis has these ticks."""
    low, high = y_ticks[0], y_ticks[-1]
    return lambda y: H - BOTTOM - (y - low) / (high - low) * (H - TOP - BOTTOM)


def frame(y_ticks: list[float], right: float, y_label: str, x_label: str) -> list[str]:
    """Grid lines, the ticks of the y axis, and the names of both axes."""
    at = [(t, height(y_ticks)(t)) for t in y_ticks]
    grid = [line(LEFT, y, right, y, "grid") + label(LEFT - 6, y + 4, short(t), "end") for t, y in at]
    return [*grid, label(4, 12, y_label, "name"), label(right, H - 4, x_label, "name end")]


def apart(ends: list[tuple[float, str, str]], gap: float = 14) -> list[tuple[float, str, str]]:
    """Labels (y first) moved down, then up from the x axis, until none covers another."""
    ends, above, below = sorted(ends), -math.inf, float(H - BOTTOM)
    for i, (y, name, hue) in enumerate(ends):
        above = max(y, above + gap)
        ends[i] = (above, name, hue)
    for i, (y, name, hue) in reversed(list(enumerate(ends))):
        ends[i] = (min(y, below), name, hue)
        below = ends[i][0] - gap
    return ends


def bars(title: str, rows: Sequence[tuple[str, float, int]], low_high: Mapping[str, tuple[float, float]] | None = None) -> str:
    """Shares from 0 to 1 as horizontal bars: (label, value, rows behind it); `low_high` draws an interval for a label. Without rows ""."""
    if not rows:
        return ""
    names = [cut(name, 22) for name, _, _ in rows]
    left, right, step = 12 + LETTER * max(map(len, names)), 106, 22
    width, tall = W, TOP + step * len(rows) + 10
    x_at = lambda v: left + v * (width - left - right)  # noqa: E731
    body = [line(x_at(t), TOP - 4, x_at(t), tall - 10, "grid") + label(x_at(t), TOP - 8, f"{t:g}", "middle") for t in (0, 0.5, 1)]
    for i, (name, value, number) in enumerate(rows):
        y = TOP + i * step
        body.append(label(left - 8, y + 14, names[i], "end"))
        body.append(f'<rect x="{left:.1f}" y="{y + 3}" width="{max(x_at(value) - left, 1):.1f}" height="{step - 8}" class="bar hue0"/>')
        if low_high and name in low_high:
            low, high = map(x_at, low_high[name])
            body += [line(low, y + 10, high, y + 10, "interval"), *(line(x, y + 6, x, y + 14, "interval") for x in (low, high))]
        body += [label(width - right + 10, y + 14, short(value)), label(width - right + 58, y + 14, f"n {number}", "faint")]
    return figure(title, "".join(body), width, tall)


def histogram(title: str, values: Sequence[int], x_label: str, y_label: str) -> str:
    """Counts of whole numbers in at most 24 bins of equal width."""
    if not values:
        return ""
    first, width = min(values), max(1, math.ceil((max(values) - min(values) + 1) / 24))
    counts = [0] * ((max(values) - first) // width + 1)
    for value in values:
        counts[(value - first) // width] += 1
    y_ticks = ticks(0, max(counts), 4)
    right = 16
    slot = (W - LEFT - right) / max(len(counts), 8)
    body = frame(y_ticks, W - right, y_label, x_label)
    for i, count in enumerate(counts):
        x, y = LEFT + i * slot, height(y_ticks)(count)
        body.append(f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{slot - 2:.1f}" height="{H - BOTTOM - y:.1f}" class="bar hue0"/>')
        if i % max(1, math.ceil(len(counts) / 8)) == 0:
            low = first + i * width
            body.append(label(x + slot / 2, H - BOTTOM + 16, f"{low}" if width == 1 else f"{low}–{low + width - 1}", "middle"))
    return figure(title, "".join(body))


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], counts: Sequence[Sequence[int]], y_label: str, x_label: str) -> str:
    """Counts in cells, each row shaded by its own share; right is where a row's first word is the column's name."""
    left, top, wide, high = 228, 44, 56, 26
    width, tall = left + wide * (len(columns) + 1), top + high * len(rows) + 8
    body = [label(left - 8, top - 8, y_label, "name end"), label(left, 14, x_label, "name")]
    body += [label(left + (j + 0.5) * wide, top - 8, name, "middle") for j, name in enumerate(columns)]
    body.append(label(left + (len(columns) + 0.5) * wide, top - 8, "n", "middle faint"))
    for i, (name, row) in enumerate(zip(rows, counts, strict=True)):
        y, total = top + i * high, sum(row)
        body.append(label(left - 8, y + 17, cut(name, 32), "end"))
        for j, count in enumerate(row):
            x, share = left + j * wide, count / max(total, 1)
            box = f'<rect x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{high - 2}"'
            body.append(f'{box} class="cell"/>')
            if count:
                hit = "right" if name.split(" ")[0] == columns[j] else "wrong"
                hover = f"<title>{text(name)}, {text(columns[j])}: {count} of {total}</title>"
                body.append(f'{box} class="{hit}" fill-opacity="{0.15 + 0.6 * share:.2f}">{hover}</rect>')
                body.append(label(x + wide / 2, y + 17, str(count), "middle"))
        body.append(label(left + (len(columns) + 0.5) * wide, y + 17, str(total), "middle faint"))
    return figure(title, "".join(body), width, tall, "wide")


Bins = Sequence[tuple[float, float, float, float, int]]  # mean score, share, low and high of its interval, rows


def reliability(title: str, series: Mapping[str, Bins], bins: int, x_label: str, y_label: str) -> str:
    """Scores against shares, both from 0 to 1, with the diagonal where they agree, of those of `bins` equal bins that have rows. Below,
    the rows in them, as bars up to the fullest bin's."""
    side, strip, names = 300, 46, 78
    right, foot = LEFT + side, TOP + side
    at = lambda x, y: (LEFT + x * side, foot - y * side)  # noqa: E731
    body = [label(4, 12, y_label, "name"), label(right, foot + 32, x_label, "name end")]
    for t in (0, 0.2, 0.4, 0.6, 0.8, 1):
        (x, y), value = at(t, t), f"{t:g}"
        body += [line(LEFT, y, right, y, "grid"), label(LEFT - 6, y + 4, value, "end"), label(x, foot + 16, value, "middle")]
    body.append(line(*at(0, 0), *at(1, 1), "axis"))
    most = max(bin[4] for filled in series.values() for bin in filled)
    for number, (name, filled) in enumerate(series.items()):
        hue, base = f"hue{number % 5}", foot + 44 + strip * (number + 1)
        points = [at(score, share) for score, share, *_ in filled]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f'<polyline points="{path}" class="curve faint {hue}"/>')
        for (x, y), (score, _, low, high, rows) in zip(points, filled, strict=True):
            middle, tall = at((min(int(score * bins), bins - 1) + 0.5) / bins, 0)[0], max(rows / most * (strip - 18), 1)
            body.append(line(x, at(0, low)[1], x, at(0, high)[1], f"interval {hue}"))
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" class="dot {hue}"/>')
            body.append(f'<rect x="{middle - 7:.1f}" y="{base - tall:.1f}" width="14" height="{tall:.1f}" class="bar {hue}"/>')
            body.append(label(middle, base - tall - 4, str(rows), "middle faint"))
        body += [line(LEFT, base, right, base, "axis"), label(right + 8, base, name, f"dot {hue}")]
    return figure(title, "".join(body), right + names, foot + 50 + strip * len(series))
