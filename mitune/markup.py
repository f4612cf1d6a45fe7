"""Text as HTML for the site's pages: markdown with its formulas as MathML, tables that fit a screen, code folded, pictures in boxes."""

from __future__ import annotations

import html
import re
import struct
from collections.abc import Mapping

from latex2mathml.converter import convert
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from mitune import claims

SCRIPT = {letter: chr(0x1D49C + n) for n, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ")} | dict(zip("BEFHILMR", "ℬℰℱℋℐℒℳℛ", strict=True))
MENDS = {  # of what latex2mathml writes, for what browsers make of it
    r'<mi mathvariant="script">([A-Z])</mi>': lambda letter: f"<mi>{SCRIPT[letter[1]]}</mi>",  # browsers leave mathvariant out of account
    r"<mo>&#x02016;</mo>": '<mo stretchy="false" lspace="0" rspace="0">&#x02016;</mo>',  # the bars of a norm, else of unequal height
    r"<mi>;</mi>": "<mo>;</mo>",  # with space behind it
    r"<mi>(log|exp|max|min)</mi>(?=<m(?!o))": r'\g<0><mspace width="0.167em"/>',
}
VERDICT = rf"<td[^>]*>(?:<strong>)?({'|'.join([*claims.VERDICTS, *claims.OWN.values()])})(?:</strong>)?</td>"
LONG = 40  # characters of LaTeX: a formula in a line that is longer scrolls by itself


def mathml(tex: str, display: str = "inline") -> str:
    """A formula as MathML. Raises ValueError for a command that the converter does not know."""
    try:
        made = convert(" ".join(tex.split()), display=display)
    except Exception as error:
        raise ValueError(f"formula {tex.strip()!r} cannot be written as MathML: {error!r}") from None
    if unknown := re.search(r">(\\[A-Za-z]+)", made):
        raise ValueError(f"formula {tex.strip()!r} has the command {unknown[1]}, which latex2mathml does not know: write it otherwise")
    for found, mended in MENDS.items():
        made = re.sub(found, mended, made)
    return made


class _Renderer(IPythonRenderer):
    """Markdown with formulas as MathML and links between notebooks as links between pages."""

    def __init__(self):
        super().__init__(escape=False, exclude_anchor_links=True)

    def inline_math(self, body: str) -> str:
        made = mathml(body)
        return f'<span class="long">{made}</span>' if len(body) > LONG else made

    def block_math(self, body: str) -> str:
        return f'<span class="display">{mathml(body, "block")}</span>'

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, re.sub(r"^(?!\w+:)([^#]*)\.ipynb(?=#|$)", r"\1.html", url), title)


def markdown(text: str) -> str:
    return tables(MarkdownWithMath(_Renderer()).render(text))


def tables(text: str) -> str:
    """HTML with every table in a box of its own that scrolls, without pandas' own style, with verdicts marked, and with its heading at each of their cells."""
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<table\b.*?</table>", lambda table: f'<div class="scroll">{_labelled(table[0])}</div>', text, flags=re.DOTALL)
    return re.sub(VERDICT, lambda found: f'<td class="verdict {found[1].replace(" ", "-")}">{found[1]}</td>', text)


def _labelled(table: str) -> str:
    """A table of words, whose cells stand below one another on a small screen, with the name of its column at each cell; one of numbers as it is."""
    first, head, rest = re.match(r"(<table\b[^>]*>\s*)(<thead>.*?</thead>)?(.*)", table, re.DOTALL).groups()
    if not head or ("dataframe" in first and not re.search(VERDICT, rest)):
        return table
    names = re.findall(r"<th\b[^>]*>(.*?)</th>", head.partition("</tr>")[0], re.DOTALL)

    def row(found: re.Match) -> str:
        cells = iter(names)
        return re.sub(r"<(td|th)\b", lambda cell: f'<{cell[1]} data-label="{html.escape(re.sub("<.*?>", "", next(cells, "")))}"', found[0])

    return first + head + re.sub(r"<tr\b.*?</tr>", row, rest, flags=re.DOTALL)


def folded(summary: str, body: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def preformatted(text: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return f"<pre>{html.escape(text)}</pre>"


def definitions(rows: Mapping[str, str]) -> str:
    """A list of terms; the values are HTML."""
    return "<dl>" + "".join(f"<dt>{html.escape(term)}</dt><dd>{value}</dd>" for term, value in rows.items()) + "</dl>"


def boxed(name: str, png: bytes, words: str) -> str:
    """A picture that shrinks to the page's width, but never below half of its own: then it scrolls in its box."""
    width, height = struct.unpack(">II", png[16:24])
    picture = f'<img src="{name}" width="{width}" height="{height}" style="min-width: {width // 2}px" alt="{html.escape(words)}" loading="lazy">'
    return f'<div class="figure"><a href="{name}">{picture}</a></div>'
