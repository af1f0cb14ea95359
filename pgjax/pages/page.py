"""The frame and the style sheet of pages such as report.html: light and dark, wide and narrow, no scripts, nothing fetched."""

from collections.abc import Iterable, Mapping

from pgjax.pages.charts import text

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --dim: #667080; --rule: #dfe3e8; --paper: #fff; --panel: #f6f7f9;
  --c0: #2b6cb0; --c1: #c05621; --c2: #2f855a; --c3: #805ad5; --c4: #b83280; --good: #2f855a; --bad: #c53030 }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6eb; --dim: #98a1af; --rule: #343a45; --paper: #15181d; --panel: #1d2128;
  --c0: #63a4e8; --c1: #ed9150; --c2: #5fc08d; --c3: #ae92f0; --c4: #e879b4; --good: #5fc08d; --bad: #f07c7c } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 28px 20px 80px; max-width: 1180px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif }
h1 { font-size: 28px; margin: 0 0 8px; overflow-wrap: anywhere }
h2 { font-size: 19px; margin: 44px 0 10px; padding-top: 10px; border-top: 1px solid var(--rule) }
h3 { font-size: 15px; margin: 26px 0 6px }
p { margin: 6px 0 12px; max-width: 80ch; color: var(--dim) }
a { color: var(--c0) }
nav a { margin-right: 18px; white-space: nowrap }
.warning { display: inline-block; color: var(--bad); border: 1px solid; border-radius: 4px; padding: 1px 8px; margin: 0 0 10px }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 8px 20px; margin: 6px 0 14px }
dt { font-size: 12px; color: var(--dim) }
dd { margin: 0; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--dim); margin: 6px 0 }
pre { background: var(--panel); padding: 12px; overflow: auto; font-size: 12px; max-height: 420px }

.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 20px 24px; align-items: start }
figure { margin: 0; min-width: 0 }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px }
svg { display: block; width: 100%; height: auto; font-size: 11.5px; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto }
.wide svg { min-width: 680px; max-width: 960px }
svg text { fill: var(--ink) }
svg .name, svg text.faint { fill: var(--dim) }
.end { text-anchor: end }
.middle { text-anchor: middle }
line { stroke: var(--rule) }
line.axis { stroke: var(--dim) }
line.interval { stroke: var(--hue, var(--ink)); stroke-width: 1.2 }
.hue0 { --hue: var(--c0) } .hue1 { --hue: var(--c1) } .hue2 { --hue: var(--c2) } .hue3 { --hue: var(--c3) } .hue4 { --hue: var(--c4) }
.curve { fill: none; stroke: var(--hue); stroke-width: 2; stroke-linejoin: round }
.curve.faint { stroke-width: 1; opacity: .35 }
.bar, circle.dot { fill: var(--hue) }
svg text.dot { fill: var(--hue); font-weight: 600 }
.cell { fill: var(--panel) } rect.right { fill: var(--good) } rect.wrong { fill: var(--bad) }

.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; font-size: 13px; color: var(--dim); white-space: nowrap }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top }
.numbers td + td, .numbers th + th { text-align: right; padding-left: 14px; white-space: nowrap }
.numbers td:first-child { min-width: min(175px, 42vw) }
.samples { width: 100%; font-size: 13.5px }
.samples td { white-space: nowrap }
.samples .id { min-width: 150px; max-width: 260px; overflow-wrap: anywhere; white-space: normal; padding-left: 8px }
.samples td.id { border-left: 3px solid var(--good) }
.samples .no td.id { border-left-color: var(--bad) }
small { color: var(--dim) }
.unsafe { color: var(--bad) } .safe { color: var(--good) }
.samples .content td { white-space: normal; padding: 6px 0 14px 11px }
.both { display: flex; gap: 14px; flex-wrap: wrap; max-width: calc(100vw - 56px) }
.both > div { flex: 1; min-width: 240px; max-width: 100ch }
.both b { font-size: 12px; color: var(--dim); font-weight: 600 }
.both i { font-style: normal; color: var(--dim) }
.both span { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.both img { display: block; max-width: 160px; height: auto; border-radius: 3px }
.veil { overflow: hidden; cursor: pointer; align-self: start }
.veil input { position: absolute; opacity: 0 }
.veil img { filter: blur(16px) }
.veil :checked + img { filter: none }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title} · pgjax report</title><style>{style}</style></head>
<body><header>{header}</header><nav>{nav}</nav><main>{body}</main></body></html>
"""


def whole_page(title: str, header: str, sections: Mapping[str, str]) -> str:
    """The page of these sections by heading, with links to them on top; `header` and the sections are markup, an empty one is left out."""
    kept = {name: body for name, body in sections.items() if body}
    nav = " ".join(f'<a href="#s{i}">{text(name)}</a>' for i, name in enumerate(kept))
    body = "".join(f'<section id="s{i}"><h2>{text(name)}</h2>{part}</section>' for i, (name, part) in enumerate(kept.items()))
    return PAGE.format(title=text(title), style=STYLE, header=header, nav=nav, body=body)


def facts(items: Mapping[str, object]) -> str:
    """Names over their values."""
    return "<dl>" + "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in items.items()) + "</dl>"


def warnings(lines: Iterable[str]) -> str:
    return "".join(f'<div><p class="warning">{text(line)}</p></div>' for line in lines)


def table_of(*columns: str, rows: str, kind: str = "numbers") -> str:
    head = "".join(f"<th>{name}</th>" for name in columns)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def grid(charts: list[str]) -> str:
    return f'<div class="grid">{"".join(charts)}</div>' if any(charts) else ""
