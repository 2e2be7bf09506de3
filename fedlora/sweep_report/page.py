"""The report as one HTML page that needs no other file: markup, style and figures in one text.

Everything that comes from files is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib import resources

from fedlora.sweep_report.content import Picture, Report, Section, Table, Words
from fedlora.sweep_report.sheets import panel_svg, sample_svg


def html_page(report: Report) -> str:
    """The whole page."""
    title, command = escape(report.title), report.command
    style = resources.files("fedlora.sweep_report").joinpath("page.css").read_text("utf-8")
    anchors = [(f"part-{place}", section) for place, section in enumerate(report.sections)]
    links = "\n".join(f'<a href="#{name}">{escape(part.title)}</a>' for name, part in anchors)
    parts = "\n".join(
        f'<section id="{name}">\n{_section(part, 2, command)}\n</section>' for name, part in anchors
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<div class="summary">
{_words(Words(report.summary))}
</div>
</header>
<nav aria-label="Sections">
{links}
</nav>
<main>
{parts}
</main>
<footer>Made by <code>{escape(command)}</code></footer>
</body>
</html>
"""


def _section(section: Section, level: int, command: str) -> str:
    parts = [f"<h{level}>{escape(section.title)}</h{level}>"]
    titled = sum(isinstance(block, Picture) for block in section.blocks) > 1
    for block in section.blocks:
        if isinstance(block, Words):
            parts.append(_words(block))
        elif isinstance(block, Table):
            parts.append(_table(block))
        else:
            parts.append(_figure(block, command, f"<h4>{escape(block.title)}</h4>\n" * titled))
    parts += [_section(inner, level + 1, command) for inner in section.sections]
    return "\n".join(parts)


def _words(words: Words) -> str:
    if len(words.lines) == 1:
        return f"<p>{escape(words.lines[0])}</p>"
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in words.lines) + "\n</ul>"


def _table(table: Table) -> str:
    facts = table.texts == len(table.head)
    head = "".join(
        f'<th scope="col"{_kind(place, table)}>{escape(name)}</th>'
        for place, name in enumerate(table.head)
    )
    notes = f'<p class="notes">{escape(" ".join(table.notes))}</p>' if table.notes else ""
    rows, kind = "\n".join(_rows(table)), ' class="facts"' if facts else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.caption)}">\n'
        f"<table{kind}>\n<caption>{escape(table.caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n"
        f"</table>\n</div>\n{notes}"
    )


def _rows(table: Table) -> Iterator[str]:
    for row in table.rows:
        first = f'<th scope="row">{escape(row[0])}</th>'
        rest = "".join(
            f"<td{_kind(place, table)}>{escape(cell)}</td>"
            for place, cell in enumerate(row[1:], start=1)
        )
        yield f"<tr>{first}{rest}</tr>"


def _kind(place: int, table: Table) -> str:
    return "" if place < table.texts else ' class="n"'


def _figure(picture: Picture, command: str, head: str) -> str:
    legend = "".join(
        f"<li>{sample_svg(style, f'{picture.slug}-key-{place}')}{escape(name)}</li>\n"
        for place, (name, style) in enumerate(picture.legend)
    )
    panels = "\n".join(
        f'<div class="panel"><p>{escape(panel.title)}</p>\n{panel_svg(picture, place)}</div>'
        for place, panel in enumerate(picture.panels)
    )
    listed = f'<ul class="legend">\n{legend}</ul>\n' if legend else ""
    return (
        f'<figure id="{escape(picture.slug)}">\n{head}{listed}'
        f'<div class="panels columns-{picture.columns}">\n{panels}\n</div>\n'
        f"<figcaption>{escape(picture.caption)} "
        f"figures/{escape(picture.slug)}.svg and .png, drawn again by "
        f"<code>{escape(command)}</code>.</figcaption>\n</figure>"
    )
