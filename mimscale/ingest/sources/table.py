"""A table of volumes, one row each: CSV, TSV or Parquet.

Columns: `image` (several channels: FILE;FILE), or one column a channel, named by `channel_names` of the config; and
where there are: `label`, `subject`, `modality`, `split`. All others are kept for filtering, unless they may tell who
somebody is. Paths are relative to the table's folder.
"""

import csv
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimscale import console, durable
from mimscale.errors import DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.sources import dicom_tree
from mimscale.ingest.sources.cases import first_problem, missing_channel
from mimscale.ingest.sources.fence import Fence
from mimscale.ingest.sources.source import Listing, Source, modality_of, subject_of

SUFFIXES = (".csv", ".tsv", ".parquet")

_KNOWN = ("image", "label", "subject", "modality", "split")
_SPLITS = {"": None, "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
# Parts of column names under which people, their days and their documents are found.
_IDENTIFYING = re.compile(
    "name|birth|patient|accession|mrn|date|uid|ssn|dob|address|phone|mail|physician|doctor"
    "|comment|note|report|descri|path|file"
)
_IDENTIFYING_WORDS = {"id", "pid", "zip", "time"}


@dataclass(frozen=True)
class Row:
    """One row that holds something."""

    line: int  # of a text file, as an editor counts; of Parquet the number of the row
    cells: tuple[str | tuple[str, ...], ...]  # a list in a Parquet cell is a tuple


@dataclass(frozen=True)
class Table:
    """Column names, as they are written but for spaces around them, and rows."""

    path: Path
    columns: tuple[str, ...]
    rows: Iterator[Row]

    @property
    def line_word(self) -> str:
        """What a row's number counts."""
        return "row" if self.path.suffix.lower() == ".parquet" else "line"


@dataclass(frozen=True)
class _Columns:
    """Which column holds what: indices into the cells of a row."""

    known: Mapping[str, int]
    channels: Sequence[int]  # empty where the `image` column holds all channels
    tags: Mapping[str, int]

    def text(self, row: Row, name: str) -> str:
        """The cell of a known column, empty where the table does not have it."""
        return _text(row.cells[self.known[name]]) if name in self.known else ""

    def files(self, row: Row) -> list[str]:
        """The file of each channel, empty where there is none."""
        if self.channels:
            return [_text(row.cells[index]) for index in self.channels]
        image = row.cells[self.known["image"]]
        return [part.strip() for part in (image.split(";") if isinstance(image, str) else image)]


def listing(path: Path, config: IngestConfig) -> Listing:
    """The sources of a table, one a row.

    Raises:
        DataError: not a table, no `image` column, or rows that are wrong: all are named by their line at once.
    """
    table = read(path)
    known = {name.lower(): index for index, name in enumerate(table.columns) if name.lower() in _KNOWN}
    channels = _channel_columns(table, config.channel_names)
    channel_names = config.channel_names if channels else ()
    tags = kept_columns(table, {*known.values(), *channels}, config.keep_columns)
    columns = _Columns(known, channels, tags)
    faults, word = _Faults(table), table.line_word
    fence = Fence(path.parent, config.allow_outside)
    folders: dict[str, Fence] = {}
    entries: list[tuple[str, Source]] = []
    seen: set[tuple[str, ...]] = set()
    for row in table.rows:
        files, label, subject = columns.files(row), columns.text(row, "label"), columns.text(row, "subject")
        split = columns.text(row, "split").lower()
        if split not in _SPLITS:
            faults.add("with a split that is none of train, val and empty", row.line)
        if "subject" in known and not subject:
            faults.add("without a subject, in a table that has the column", row.line)
        if not any(files):
            faults.add("with an empty image", row.line)
            continue
        images = [fence.target(file) for file in files if file]
        paths = tuple(image.path for image in images)
        if paths in seen:
            faults.add("that repeat the image of an earlier one", row.line)
        seen.add(paths)
        own_folders = {image.path: fence for image in images if image.is_folder}
        folders |= own_folders
        labels = [fence.target(label)] if label else []
        source = Source(
            channels=tuple(image.files for image in images),
            label=labels[0].files if labels else (),
            # A DICOM folder's subject stands in its headers.
            subject=subject or ("" if own_folders else subject_of(paths[0], config.subject_pattern)),
            modality=modality_of(columns.text(row, "modality")),
            split=_SPLITS.get(split),
            tags={name: sys.intern(_text(row.cells[index])) for name, index in tags.items() if row.cells[index]},
            problem=missing_channel([bool(file) for file in files], channel_names) or first_problem(images + labels),
        )
        entries.append((f"{word} {row.line} of {path}", source))
    faults.refuse()
    if not entries:
        raise DataError(f"{path}: the table has no row")
    return Listing(dicom_tree.open_folders(entries, folders, config), channel_names=channel_names)


def read(path: Path) -> Table:
    """Open a table by its suffix; the rows are read as they are asked for.

    Raises:
        DataError: it cannot be read, or two columns have one name. Damage further down is raised by `rows`.
    """
    rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _text_rows(path)
    header = next(rows, None)
    if header is None:
        raise DataError(f"{path}: the table is empty; its first line must name the columns")
    columns = tuple(_text(name) for name in header.cells)
    lower = [name.lower() for name in columns if name]
    repeated = sorted({name for name in lower if lower.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: more than one column is called {', '.join(repeated)}; rename or remove one")
    return Table(path, columns, _checked(path, len(columns), rows))


def kept_columns(table: Table, used: set[int], keep: Sequence[str]) -> dict[str, int]:
    """Columns that become tags: those not in `used`, unless they may tell who somebody is. Says what is left out."""
    others = {name: index for index, name in enumerate(table.columns) if name and index not in used}
    unknown = [name for name in keep if name not in table.columns]
    if unknown:
        console.say(f"{table.path}: has no column {', '.join(unknown)}, which keep_columns lists")
    left_out = [name for name in others if name not in keep and may_identify(name)]
    if left_out:
        console.say(
            f"{table.path}: column(s) {', '.join(left_out)} may tell who somebody is and are left out; "
            f"keep_columns=[{left_out[0]}] keeps one"
        )
    return {name: index for name, index in others.items() if name not in left_out}


def may_identify(column: str) -> bool:
    """True for the name of a column that may hold names, days, numbers or texts of a person."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", column)
    lower = {word.lower() for word in words}
    return bool(lower & _IDENTIFYING_WORDS) or _IDENTIFYING.search(re.sub("[^a-z]", "", column.lower())) is not None


class _Faults:
    """Wrong rows, so that all are named at once."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._lines: dict[str, list[int]] = {}

    def add(self, what: str, line: int) -> None:
        self._lines.setdefault(what, []).append(line)

    def refuse(self) -> None:
        if not self._lines:
            return
        word = self._table.line_word
        found = [
            f"  {len(lines)} {word}(s) {what}: {', '.join(map(str, lines[:5]))}{', ...' if lines[5:] else ''}"
            for what, lines in self._lines.items()
        ]
        raise DataError(f"{self._table.path}: correct or remove these rows\n" + "\n".join(found))


def _channel_columns(table: Table, channel_names: Sequence[str]) -> list[int]:
    """Indices of the columns that hold a channel each; none when the `image` column holds all."""
    there = [name for name in channel_names if name in table.columns]
    has_image = "image" in [name.lower() for name in table.columns]
    if there and has_image:
        raise DataError(
            f"{table.path}: has a column image and the channel(s) {', '.join(there)} of channel_names; remove one kind"
        )
    if there and len(there) < len(channel_names):
        missing = [name for name in channel_names if name not in there]
        raise DataError(f"{table.path}: has no column {', '.join(missing)}, which channel_names lists")
    if not there and not has_image:
        raise DataError(
            f"{table.path}: has no column image; it has {', '.join(filter(None, table.columns)) or 'no names'}; "
            "rename the one that holds the files, or list the columns of the channels in channel_names"
        )
    return [table.columns.index(name) for name in there]


def _text(cell: str | tuple[str, ...]) -> str:
    return cell if isinstance(cell, str) else ";".join(cell)


def _checked(path: Path, width: int, rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        if not any(row.cells):
            continue  # spreadsheets leave empty lines behind
        if len(row.cells) != width:
            raise DataError(
                f"{path}: line {row.line} has {len(row.cells)} cells, the first line names {width} columns; "
                "quote cells that hold the separator"
            )
        yield row


def _text_rows(path: Path) -> Iterator[Row]:
    # Spreadsheets begin with a byte order mark: utf-8-sig passes over it.
    with (
        durable.explained(DataError, path, "give a table that you may read"),
        path.open(newline="", encoding="utf-8-sig") as file,
    ):
        try:
            first = file.readline()
            file.seek(0)
            tabs = path.suffix.lower() == ".tsv"
            # Where the comma is the decimal point, spreadsheets separate by semicolons.
            delimiter = "\t" if tabs else ";" if ";" in first and "," not in first else ","
            reader, last = csv.reader(file, delimiter=delimiter, strict=True), 0
            for cells in reader:
                yield Row(last + 1, tuple(cell.strip() for cell in cells))
                last = reader.line_num
        except UnicodeDecodeError:
            raise DataError(f"{path}: not UTF-8 text; save it as UTF-8") from None
        except csv.Error as error:
            raise DataError(f"{path}: not a table of cells ({error}) near line {reader.line_num}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        with durable.explained(DataError, path, "give a table that you may read"), path.open("rb") as data:
            file = pyarrow.parquet.ParquetFile(data)
            yield Row(0, tuple(file.schema_arrow.names))
            number = 0
            for batch in file.iter_batches():
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    yield Row(number, tuple(map(_cell, values)))
    except DataError:
        raise
    except Exception as error:  # a damaged file fails anywhere in pyarrow, whose words may repeat what is in it
        raise DataError(f"{path}: not a Parquet file that can be read ({type(error).__name__})") from None


def _cell(value: Any) -> str | tuple[str, ...]:
    if value is None or value != value:  # NaN stands for nothing
        return ""
    if isinstance(value, list):
        return tuple(_text(_cell(item)) for item in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # whole numbers beside empty cells come as floats
    return str(value).strip()
