"""The report as Markdown: the same sections as the page, figures as links to their files."""

from __future__ import annotations

import re

from fedlora.sweep_report.content import Picture, Report, Section, Table, Words


def markdown_page(report: Report) -> str:
    """The whole text."""
    parts = [f"# {plain_text(report.title)}", _words(Words(report.summary))]
    parts += [text for part in report.sections for text in _section(part, 2, report.command)]
    return "\n\n".join(parts) + "\n"


def plain_text(text: str) -> str:
    """The text such that Markdown shows it as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def _section(section: Section, level: int, command: str) -> list[str]:
    parts = [f"{'#' * level} {plain_text(section.title)}"]
    for block in section.blocks:
        if isinstance(block, Words):
            parts.append(_words(block))
        elif isinstance(block, Table):
            parts.append(_table(block))
        else:
            parts.append(_picture(block, command))
    for inner in section.sections:
        parts += _section(inner, level + 1, command)
    return parts


def _words(words: Words) -> str:
    lines = [plain_text(line) for line in words.lines]
    return lines[0] if len(lines) == 1 else "\n".join(f"* {line}" for line in lines)


def _table(table: Table) -> str:
    marks = ["---" if place < table.texts else "---:" for place in range(len(table.head))]
    rows = [[plain_text(cell) for cell in row] for row in (table.head, *table.rows)]
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], marks, *rows[1:])]
    parts = [f"**{plain_text(table.caption)}**", "\n".join(lines)]
    return "\n\n".join([*parts, plain_text(" ".join(table.notes))]).strip()


def _picture(picture: Picture, command: str) -> str:
    image = f"![{plain_text(picture.title)}](figures/{picture.slug}.svg)"
    return f"{image}\n\n{plain_text(picture.caption)} Drawn again by `{command}`."
