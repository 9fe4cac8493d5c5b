"""What a user typed as inputs -> volumes to be, each with a name for what is written of it."""

import dataclasses
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimscale.errors import DataError
from mimscale.ingest.config import ImageLabel, IngestConfig
from mimscale.ingest.formats import QuarantineError
from mimscale.ingest.formats.dicom_header import read_header
from mimscale.ingest.sources import Source, find, stem
from mimscale.ingest.sources.files import is_volume

EVERY_SERIES = "all"
# Of a folder: DICOM files that are no volume to predict on. They belong beside one, and are no failures.
_BESIDE_VOLUMES = ("copied_files", "localizer", "not_an_image", "colour")
_CHANNEL_NUMBER = re.compile(r"_\d{4}$")  # nnU-Net's: case_0000.nii.gz, case_0001.nii.gz


@dataclass(frozen=True, kw_only=True)
class Input:
    """One volume to predict on, or why there is none."""

    typed: str  # what the user typed
    name: str  # for people, and of what is written; unlike that of every other input
    source: Source | None
    problem: str | None = None

    @property
    def is_dicom(self) -> bool:
        """Whether its files are DICOM instances."""
        return self.source is not None and is_dicom(self.source)


def is_dicom(source: Source) -> bool:
    """Whether the files of a source are DICOM instances."""
    return not is_volume(source.channels[0][0])


def find_inputs(words: Sequence[str], config: IngestConfig, series: str | None) -> list[Input]:
    """All volumes that the words stand for. What is wrong with one of them is its `problem`.

    A word is a volume file, files of its channels joined by commas, a folder of volumes or of one DICOM series, or any
    list that `mimscale ingest` reads.

    Args:
        words: as typed.
        config: how sources are read.
        series: of folders with several DICOM series: the SeriesInstanceUID of one, "all", or None, which refuses them.
    """
    found: list[Input] = []
    for word in words:
        try:
            sources = _sources_of(word, config, series)
        except DataError as error:
            found.append(Input(typed=word, name=_stem(word), source=None, problem=str(error).removeprefix("sources=")))
            continue
        found += [_input(word, source, config.channels) for source in sources]
    return _named_apart(found)


def _sources_of(word: str, config: IngestConfig, series: str | None) -> list[Source]:
    path = Path(word).expanduser()
    if "," in word and not path.exists():
        return list(find([ImageLabel(image=tuple(word.split(",")))], config).sources)
    # The name of a file that is there means itself, also with brackets in it.
    sources = list(find(glob.escape(word) if path.is_file() else word, config).sources)
    if not path.is_dir():
        return sources
    volumes = [source for source in sources if source.problem is None]
    return _chosen_series(word, volumes, series) + _worth_a_word(sources, bool(volumes))


def _worth_a_word(sources: Iterable[Source], has_volumes: bool) -> list[Source]:
    """Sources with problems: in a folder of volumes, not those that merely lie beside them."""
    bad = [source for source in sources if source.problem is not None]
    if has_volumes:
        return [source for source in bad if source.problem and source.problem[0] not in _BESIDE_VOLUMES]
    return bad[:1]


def _chosen_series(word: str, volumes: list[Source], series: str | None) -> list[Source]:
    """The volumes of a folder; of several DICOM series the one that was asked for.

    Raises:
        DataError: there are several and none was asked for, or there is no such series.
    """
    dicom = [source for source in volumes if is_dicom(source)]
    others = [source for source in volumes if not is_dicom(source)]
    if series == EVERY_SERIES or (series is None and len(dicom) < 2):
        return others + dicom
    listed = "\n".join(f"  {_described(source)}" for source in dicom) or "  none"
    if series is None:
        raise DataError(
            f"{word}: holds {len(dicom)} DICOM series:\n{listed}\n"
            f"choose one with series=UID, take all with series={EVERY_SERIES}, or give the folder of one"
        )
    chosen = [source for source in dicom if _series_uid(source) == series]
    if not chosen and dicom:
        raise DataError(f"{word}: holds no series {series}; there are:\n{listed}")
    return others + chosen


def _described(source: Source) -> str:
    folder = os.path.dirname(source.channels[0][0])
    return f"{_series_uid(source)}: {len(source.channels[0])} files, {source.modality or 'no modality'}, in {folder}"


def _series_uid(source: Source) -> str:
    try:
        with open(source.channels[0][0], "rb") as file:
            return read_header(file, ["SeriesInstanceUID"]).text("SeriesInstanceUID")
    except (OSError, QuarantineError):
        return "no UID"


def _input(word: str, source: Source, channels: int) -> Input:
    files = source.channels[0]
    name = _stem(files[0])
    if is_dicom(source) and len(files) > 1:
        name = os.path.basename(os.path.dirname(os.path.abspath(files[0]))) or "series"
    elif len(source.channels) > 1:
        name = _name_of_case([one[0] for one in source.channels])
    problem = None
    if len(source.channels) not in (1, channels):
        problem = (
            f"has {len(source.channels)} channels, the networks were trained on {channels}; give as many files, joined "
            "by commas, in the order of training"
        )
    return Input(typed=word, name=name, source=source, problem=problem)


def _name_of_case(files: Sequence[str]) -> str:
    """What the files of its channels have in common: sub-1 of sub-1_T1w.nii and sub-1_T2w.nii, else their folder."""
    names = [_CHANNEL_NUMBER.sub("", _stem(file)) for file in files]
    if len(set(names)) == 1:
        return names[0]
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = re.sub(r"[^_.-]*$", "", "".join(letters[0] for letters in same)).rstrip("_.-")
    return common or os.path.basename(os.path.dirname(os.path.abspath(files[0]))) or names[0]


def _stem(path: str) -> str:
    name = stem(path.rstrip("/").split(",")[0])
    return name.removesuffix(".dcm") or "input"


def _named_apart(inputs: list[Input]) -> list[Input]:
    """Give inputs of one name the names of their folders too; what is the same then is numbered."""
    count = Counter(one.name for one in inputs)
    wider = [
        dataclasses.replace(one, name=f"{_folder_of(one)}_{one.name}") if count[one.name] > 1 and one.source else one
        for one in inputs
    ]
    count = Counter(one.name for one in wider)
    seen: Counter[str] = Counter()
    apart = []
    for one in wider:
        seen[one.name] += 1
        apart.append(dataclasses.replace(one, name=f"{one.name}_{seen[one.name]}") if count[one.name] > 1 else one)
    return apart


def _folder_of(one: Input) -> str:
    assert one.source is not None, "an input without a source has no folder"
    folder = os.path.dirname(os.path.abspath(one.source.channels[0][0]))
    if os.path.basename(folder) == one.name:  # a series is called after its folder already
        folder = os.path.dirname(folder)
    return os.path.basename(folder) or "root"
