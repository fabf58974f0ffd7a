"""Tables for the terminal: numbers on the right, names as they are, and no cell cut."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hipp_ext.files.untrusted import shown

if TYPE_CHECKING:
    from rich.table import Table

Rows = Sequence[Sequence[object]]


def text_table(
    header: Sequence[str],
    rows: Rows,
    *,
    title: str | None = None,
    left: int = 1,
    wrap: int = 0,
    **options: Any,
) -> "Table":
    """A table for rich, in which nothing is read as markup.

    Args:
        header: names of the columns.
        rows: cells of each row.
        title: title of the table.
        left: number of columns, from the first, that are aligned to the left.
        wrap: number of columns, from the first, whose cells may be broken into lines.
        options: arguments of rich's `Table`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(**{"title": title and Text(shown(title)), "box": SIMPLE_HEAD, **options})
    for i, name in enumerate(header):
        justify = "left" if i < left else "right"
        table.add_column(Text(name), justify=justify, no_wrap=i >= wrap, overflow="fold")
    add_rows(table, rows)
    return table


def parameters_text(number: int) -> str:
    """A number of parameters, in millions or billions."""
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def add_rows(table: "Table", rows: Rows) -> None:
    """Add a section of rows to a table."""
    from rich.text import Text

    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    table.add_section()


def print_table(table: "Table") -> None:
    """Print a table on standard output; in a narrow terminal its lines wrap."""
    from rich.console import Console

    console = Console()
    needed = console.measure(table, options=console.options.update(width=10_000)).maximum
    Console(width=max(console.width, needed)).print(table, soft_wrap=True)


class FittingTable:
    """A table for rich that is divided into short ones if the terminal is too narrow for it.

    Args:
        title: title of the table.
        names: names of the first three columns. Rows with the same first two cells are in one
            short table.
        parts: names of the other columns, for each short table; "\\n" may break a name there.
        rows: cells of each row.
        heading: format of the line above short tables, of the first two cells.
        options: arguments of rich's `Table` for the whole table.
    """

    def __init__(
        self,
        title: str,
        names: Sequence[str],
        parts: Sequence[Sequence[str]],
        rows: Sequence[Sequence[str]],
        heading: str,
        **options: Any,
    ):
        self.title, self.name, self.parts, self.heading = title, names[-1], parts, heading
        self.blocks: dict[tuple[str, ...], list[Sequence[str]]] = {}
        for row in rows:
            self.blocks.setdefault(tuple(row[:2]), []).append(row)
        header = [name.replace("\n", " ") for part in (names, *parts) for name in part]
        self.whole = text_table(header, (), left=len(names), title=title, **options)
        for own in self.blocks.values():
            add_rows(self.whole, own)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The whole table if it fits."""
        from rich.text import Text

        free = options.update(width=10_000)
        if console.measure(self.whole, options=free).maximum <= options.max_width:
            yield self.whole
            return
        yield Text(self.title, "italic")
        for key, rows in self.blocks.items():
            yield Text("\n" + shown(self.heading.format(*key)), "bold")
            first = 3
            for part in self.parts:
                places = [i for i in range(first, first + len(part)) if any(r[i] for r in rows)]
                header = [self.name, *(part[i - first] for i in places)]
                cells = [[row[2], *(row[i] for i in places)] for row in rows]
                yield text_table(
                    header, cells, wrap=1, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
                )
                first += len(part)
        yield ""
