"""A report of headings, text, tables and figures, written as one HTML page (figures inside) and as Markdown."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2128; background: #fff }
h1 { margin-bottom: 0.2rem } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d5dae1; padding-bottom: 0.2rem }
table { border-collapse: collapse; margin: 0.8rem 0 } th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid #e3e7ec; text-align: left }
th { border-bottom: 2px solid #9aa4b0 } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto } pre { background: #f3f5f8; padding: 0.8rem; overflow-x: auto; border-radius: 4px }
"""


@dataclass
class Report:
    """Grows by its methods; :meth:`write` saves both forms.

    Attributes:
        title: of the page.
        introduction: the text below it.
        summary: (what, result) pairs shown before everything else.
    """

    title: str
    introduction: str
    summary: list[tuple[str, str]] = field(default_factory=list)
    _html: list[str] = field(default_factory=list)
    _markdown: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self._html.append(f"<h2>{html.escape(text)}</h2>")
        self._markdown.append(f"## {text}")

    def text(self, text: str) -> None:
        self._html.append(f"<p>{html.escape(text)}</p>")
        self._markdown.append(text)

    def code(self, text: str) -> None:
        self._html.append(f"<pre>{html.escape(text)}</pre>")
        self._markdown.append(f"```\n{text}\n```")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns of numbers are set to the right; a table whose first column has no name holds names and values."""
        html_form, markdown_form = _table(header, rows)
        self._html.append(html_form)
        self._markdown.append(markdown_form)

    def figure(self, path: Path, description: str) -> None:
        """A PNG beside the report."""
        data = base64.b64encode(path.read_bytes()).decode()
        alt = html.escape(description, quote=True)
        self._html.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>')
        self._markdown.append(f"![{description}]({path.name})")

    def write(self, folder: Path) -> Path:
        """Write ``report.html`` and ``report.md``; returns the path of the first."""
        title = html.escape(self.title)
        summary_html, summary_markdown = _table(["", "result"], self.summary)
        page = (
            f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
            f"<body>\n<h1>{title}</h1>\n<p>{html.escape(self.introduction)}</p>\n{summary_html}\n"
            + "\n".join(self._html)
            + "\n</body>\n</html>\n"
        )
        markdown = "\n\n".join([f"# {self.title}", self.introduction, summary_markdown, *self._markdown]) + "\n"
        texts = {"report.html": page, "report.md": markdown}
        for name, text in texts.items():
            new = folder / f"{name}.tmp"
            new.write_text(text, encoding="utf-8")
            new.replace(folder / name)
        return folder / "report.html"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> tuple[str, str]:
    """As HTML and as Markdown."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [
        bool(header[0]) and all(row[i][:1].isdigit() or row[i] == "–" for row in cells) for i in range(len(header))
    ]

    def line(tag: str, row: Sequence[str]) -> str:
        classes = [' class="number"' if is_number else "" for is_number in right]
        return "<tr>" + "".join(f"<{tag}{c}>{html.escape(cell)}</{tag}>" for c, cell in zip(classes, row)) + "</tr>"

    body = "\n".join([line("th", header), *(line("td", row) for row in cells)])
    rule = ["--:" if is_number else "---" for is_number in right]
    markdown = "\n".join("| " + " | ".join(row) + " |" for row in [list(header), rule, *cells])
    return f"<table>\n{body}\n</table>", markdown
