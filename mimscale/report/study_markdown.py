"""A study's results as one Markdown file: the tables of the page, to be kept, compared and cited without it."""

from collections.abc import Sequence

from mimscale.report.study import StudyView, Table


def study_markdown(view: StudyView) -> str:
    """Everything of a study's page that is words or numbers; pictures and configs stay in the report's folder."""
    parts = [f"# {view.title}", *([view.question] if view.question else [])]
    parts += [_list(view.notes)] if view.notes else []
    for section in view.sections:
        parts += [f"## {section.heading}", section.question]
        if not section.measured:
            parts.append("Nothing is measured yet.")
            continue
        parts.append(_list(section.answers))
        parts += [_table(table) for table in (*section.tables, *section.classes) if table.rows]
    parts += ["## Cost", _table(view.costs)]
    parts += ["## Where each number comes from", *(_table(table) for table in view.provenance)]
    parts += [_list([f"{name}: {', '.join(ids)}" for name, ids in view.volumes])] if view.volumes else []
    place = view.nodes.columns.index("state")
    missing = [row for row in view.nodes.rows if row[place] != "done"]
    if missing:
        parts += ["## Nodes that are not done", _table(Table(title="", columns=view.nodes.columns, rows=missing))]
    return "\n\n".join([*parts, view.footer]) + "\n"


def _table(table: Table) -> str:
    lines = [f"### {table.title}", ""] if table.title else []
    dashes = ["---" if place < table.text_columns else "---:" for place in range(len(table.columns))]
    lines += [_row(table.columns), _row(dashes), *(_row(row) for row in table.rows)]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_text(cell) for cell in cells)} |"


def _text(cell: str) -> str:
    """A cell that neither ends its column nor its row, nor is taken for markup."""
    text = " ".join(cell.split())
    for mark, instead in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;")):
        text = text.replace(mark, instead)
    return text


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_text(line)}" for line in lines)
