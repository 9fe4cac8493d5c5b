"""Image files and label files -> cases: what has one name belongs together.

nnU-Net's channel numbers (`CASE_0000`, `CASE_0001`, ...) are channels of one case, whose label is called `CASE`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from mimscale.errors import DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.sources.fence import Target
from mimscale.ingest.sources.files import Problem
from mimscale.ingest.sources.source import Source, modality_of_channels, stem, subject_of

_NUMBERED = re.compile(r"(.+)_(00\d\d)")
Channels = dict[int, Target]


def have_channel_numbers(images: Iterable[str], labels: Iterable[str]) -> bool:
    """True when the numbers at the end of image names count channels, and not cases: then no label carries them."""
    label_names = {stem(label) for label in labels}
    numbered = [name for name in map(stem, images) if _NUMBERED.fullmatch(name)]
    return bool(numbered) and not any(name in label_names for name in numbered)


def by_case(images: Iterable[Target], channel_numbers: bool) -> dict[str, Channels]:
    """Channel files of each case.

    Raises:
        DataError: two files have one name, so that a label could belong to either.
    """
    cases: dict[str, Channels] = defaultdict(dict)
    repeats = 0
    for image in images:
        name, channel = stem(image.path), 0
        match = _NUMBERED.fullmatch(name) if channel_numbers else None
        if match:
            name, channel = match[1], int(match[2])
        repeats += channel in cases[name]
        cases[name][channel] = image
    _refuse_repeats("images", repeats)
    return dict(cases)


def by_name(labels: Iterable[Target]) -> dict[str, Target]:
    """Label file of each case.

    Raises:
        DataError: two files have one name.
    """
    named: dict[str, Target] = {}
    repeats = 0
    for label in labels:
        name = stem(label.path)
        repeats += name in named
        named[name] = label
    _refuse_repeats("labels", repeats)
    return named


def sources(
    where: str,
    cases: dict[str, Channels],
    labels: dict[str, Target],
    config: IngestConfig,
    channel_names: tuple[str, ...] = (),
) -> list[Source]:
    """One source a case. A label without an image is a source with a problem: nothing is lost in silence.

    Args:
        where: what an error calls the cases.
        cases: their image files.
        labels: their label files.
        config: for the subject's name.
        channel_names: the channels that each case needs; default: those that any case has.

    Raises:
        DataError: more channels than names, or not one label has an image.
    """
    numbers = sorted({number for channels in cases.values() for number in channels})
    if channel_names and numbers and numbers[-1] >= len(channel_names):
        raise DataError(
            f"{where}: dataset.json names {len(channel_names)} channel(s), and there are files _{numbers[-1]:04d}; "
            "name all channels"
        )
    orphans = labels.keys() - cases.keys()
    if labels and len(orphans) == len(labels):
        raise DataError(
            f"{where}: none of {len(labels)} label(s) has an image of its name (apart from a channel number _0000); "
            "where names differ give pairs, [{image: FILE, label: FILE}, ...], or a table"
        )
    needed = range(len(channel_names)) if channel_names else numbers
    modality = modality_of_channels(channel_names)
    listed = []
    for case, channels in cases.items():
        label = labels.get(case)
        files = [*channels.values(), *([label] if label else [])]
        source = Source(
            channels=tuple(channels[number].files for number in sorted(channels)),
            label=label.files if label else (),
            subject=subject_of(case, config.subject_pattern),
            modality=modality,
            problem=missing_channel([number in channels for number in needed], channel_names) or first_problem(files),
        )
        listed.append(source)
    for name in sorted(orphans):
        source = Source(
            channels=(labels[name].files,),
            subject=subject_of(name, config.subject_pattern),
            problem=("label_without_image", "a label map, and no image has its name"),
        )
        listed.append(source)
    return listed


def first_problem(files: Iterable[Target]) -> Problem | None:
    """The problem of the first file that has one."""
    return next((file.problem for file in files if file.problem), None)


def missing_channel(there: Sequence[bool], names: Sequence[str] = ()) -> Problem | None:
    """The problem of a case in which not every channel is `there`."""
    if all(there):
        return None
    number = there.index(False)
    called = f" ({names[number]})" if names else ""
    return ("missing_channel", f"channel {number}{called} of {len(there)} has no file")


def _refuse_repeats(kind: str, count: int) -> None:
    if count:
        raise DataError(
            f"sources: {count} of the {kind} have the name of another one (in another folder or format), so labels "
            "cannot be paired by name; give pairs, [{image: FILE, label: FILE}, ...], or a table"
        )
