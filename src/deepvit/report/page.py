"""One HTML page that needs nothing else: tables and charts inside it, readable on a phone, no script."""

import base64
import html
from collections.abc import Sequence

from deepvit.report.chart import Chart

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 84rem; margin: 0 auto;
       padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .45rem; text-align: right; border-bottom: 1px solid #d8dee4; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; min-width: 3.2rem; background: #f6f8fa; font-weight: 600; }
.left { text-align: left; } td.open { color: #9a3412; font-weight: 600; white-space: normal; min-width: 7rem; }
.notes { font-size: .875rem; color: #424a53; padding-left: 1.2rem; } figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; } figcaption { font-size: .875rem; color: #424a53; }
details { margin: .5rem 0; font-size: .875rem; } code, p, li { overflow-wrap: anywhere; }
td.long { white-space: normal; min-width: 9rem; }
@media (max-width: 700px) {
  body { padding: .6rem; } table { font-size: .75rem; } th, td { padding: .2rem .35rem; }
  th { min-width: 2.2rem; } td.long { min-width: 7rem; }
}
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; } table { font-size: 7pt; }
  th, td { padding: 1pt 3pt; min-width: 0; } td.long, td.open { min-width: 0; } tr, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; } figure img { max-height: 170mm; object-fit: contain; }
}
"""


def page(title: str, sections: Sequence[str]) -> str:
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
            f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{''.join(sections)}</body></html>\n")


def figure(chart: Chart) -> str:
    """Side by side on a screen, one panel a row on a phone."""
    caption = html.escape(chart.caption)
    return (f'<figure><picture><source media="(max-width: 700px)" srcset="{_data(chart.narrow_svg)}">'
            f'<img src="{_data(chart.svg)}" alt="{caption}"></picture><figcaption>{caption}</figcaption></figure>')


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
