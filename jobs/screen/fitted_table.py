"""A table that fits its screen: columns without room are left out, the least important first; names stay whole.

Where even the columns that must stay have no room beside the names, each name gets a line of its own, and the columns
stand below it.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

GAP = "  "  # between columns
INDENT = "    "  # of what stands below a name
Cell = str | Text


@dataclass(frozen=True)
class Column:
    """One column; of those without room the one of least importance goes first, and one of None never."""

    title: str
    importance: int | None = None
    align_right: bool = True


@dataclass(frozen=True)
class Row:
    """A name with a cell for each column and a note, which may be long; without cells a line of its own."""

    name: Text
    cells: tuple[Text, ...]
    note: str


@dataclass(frozen=True)
class Layout:
    """The width of the names, 0 where each stands on a line of its own, and of the columns shown, by their index."""

    name_width: int
    widths: Mapping[int, int]

    @property
    def width(self) -> int:
        return self.name_width + sum(len(GAP) + width for width in self.widths.values())


class FittedTable:
    """Rows and headings, added in their order and laid out for the width of the screen that prints them."""

    def __init__(self, name_title: str, columns: Sequence[Column], title: str = "") -> None:
        self.title, self.columns = title, tuple(columns)
        self.titles = Row(Text(name_title), tuple(Text(column.title) for column in columns), "")
        self.legend: list[str] = []  # lines between the title and the columns
        self.rows: list[Row] = []

    def add_heading(self, heading: str) -> None:
        """A line over the whole width, after an empty one."""
        self.rows += [Row(Text(), (), ""), Row(Text(heading, style="bold"), (), "")]

    def add_row(self, name: str, *cells: Cell, note: str = "") -> None:
        """As many cells as there are columns; none where there is nothing but the note to say."""
        assert len(cells) in (0, len(self.columns))
        self.rows.append(Row(Text(name), tuple(Text(cell) if isinstance(cell, str) else cell for cell in cells), note))

    def layout(self, width: int) -> Layout:
        """All columns if there is room; else without the least important, then with the names on lines of their own."""
        rows = [self.titles, *(row for row in self.rows if row.cells)]
        name_width = max(row.name.cell_len for row in rows)
        widths = {idx: max(row.cells[idx].cell_len for row in rows) for idx in range(len(self.columns))}
        ranked = [(column.importance, idx) for idx, column in enumerate(self.columns) if column.importance is not None]
        for _, idx in sorted(ranked):
            if Layout(name_width, widths).width > width:
                del widths[idx]
        beside = Layout(name_width, widths)
        return beside if beside.width <= width else Layout(0, widths)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        layout = self.layout(options.max_width)
        if self.title:
            yield Text(self.title, style="italic")
        yield from map(Text, self.legend)
        yield from self.lines(self.titles, layout, options.max_width)
        yield Text("─" * min(layout.width, options.max_width))
        for row in self.rows:
            yield from self.lines(row, layout, options.max_width)
        if left_out := [column.title for idx, column in enumerate(self.columns) if idx not in layout.widths]:
            yield Text(f"no room here for {', '.join(left_out)}", style="dim italic")

    def lines(self, row: Row, layout: Layout, width: int) -> Iterator[Text]:
        """One row: the name, the cells and, where there is room, the note in one line, or below each other."""
        line = row.name.copy()
        if row.cells and layout.name_width:
            line.pad_right(layout.name_width - line.cell_len)
        elif row.cells:
            if line:
                yield line
            line = Text(INDENT[: -len(GAP)])
        cells = [self.aligned(row.cells[idx], idx, layout.widths[idx]) for idx in layout.widths if row.cells]
        line = Text(GAP).join([line, *cells])
        if row.note and line and line.cell_len + len(GAP) + len(row.note) <= width:
            yield Text.assemble(line, GAP, row.note)
            return
        line.rstrip()
        if line or not row.note:
            yield line
        for part in textwrap.wrap(row.note, max(width - len(INDENT), 1), break_long_words=False):
            yield Text(INDENT + part)

    def aligned(self, cell: Text, idx: int, width: int) -> Text:
        spaces = " " * (width - cell.cell_len)
        return Text.assemble(spaces, cell) if self.columns[idx].align_right else Text.assemble(cell, spaces)
