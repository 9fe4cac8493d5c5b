"""A folder for each subject, whose files begin with its name: SUBJECT/SUBJECT_t1.nii.gz, SUBJECT_flair.nii.gz, ...

So BraTS is published, since 2023 with a dash: SUBJECT/SUBJECT-t1c.nii.gz. `channel_names` says which words become
channels, and with that which folders are read so; the word `seg` is the label map, all others are left out.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mimscale import console
from mimscale.errors import DataError
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.sources.cases import first_problem, missing_channel
from mimscale.ingest.sources.fence import Fence, Target
from mimscale.ingest.sources.files import Problem, is_volume
from mimscale.ingest.sources.source import Listing, Source, modality_of_channels, stem, subject_of

LABEL = "seg"
_DASHES = ("_", "-")  # between the subject and the word


@dataclass
class _Folder:
    path: str
    named: dict[str, Target] = field(default_factory=dict)  # word -> its file
    others: int = 0  # volumes that are not called like the folder
    repeats: int = 0  # files whose word another one has, in another format
    problem: Problem | None = None  # why it cannot be entered

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def is_layout(folder: Path, config: IngestConfig) -> bool:
    """True for a folder of subjects' folders, at least one of which has a file of one of `channel_names`.

    Raises:
        DataError: the subjects' folders lie one deeper.
    """
    if not config.channel_names:
        return False
    if _has_subjects(folder, config):
        return True
    for child in sorted(path for path in _children(folder) if _has_subjects(path, config)):
        raise DataError(f"sources={folder}: the subjects' folders lie one deeper; give sources={child}")
    return False


def listing(folder: Path, config: IngestConfig) -> Listing:
    """One source a subject. A subject without one of the channels is a source with a problem.

    Raises:
        DataError: a subject has two files of one word.
    """
    names = config.channel_names
    fence = Fence(folder, config.allow_outside)
    subjects, empty = [], 0
    for one in _folders(folder, fence):
        if one.named or one.others or one.problem:
            subjects.append(one)
        else:
            empty += 1
    if repeats := sum(one.repeats for one in subjects):
        raise DataError(
            f"sources={folder}: {repeats} file(s) have the name of another one, in another format; remove one of each"
        )
    loose = sum(is_volume(target.path) and not target.is_folder for target in fence.targets_in(str(folder)))
    for count, what in ((empty, "folder(s) hold no volume"), (loose, "volume(s) lie outside of the subjects' folders")):
        if count:
            console.say(f"sources={folder}: {count} {what} and were left out")
    place = f"a subject of {folder}"
    return Listing([(place, _source(one, names, config)) for one in subjects], channel_names=names)


def _source(folder: _Folder, names: tuple[str, ...], config: IngestConfig) -> Source:
    channels = [folder.named[name] for name in names if name in folder.named]
    labels = [folder.named[LABEL]] if LABEL in folder.named else []
    # What has no channel at all still must have a name by which it is found again.
    files = tuple(target.files for target in channels or list(folder.named.values())[:1]) or ((folder.path,),)
    problem = folder.problem or missing_channel([name in folder.named for name in names], names)
    return Source(
        channels=files,
        label=labels[0].files if labels and channels else (),
        subject=subject_of(folder.name, config.subject_pattern),
        modality=modality_of_channels(names),
        problem=problem or first_problem(channels + labels),
    )


def _has_subjects(folder: Path, config: IngestConfig) -> bool:
    folders = _folders(folder, Fence(folder, config.allow_outside))
    return any(set(config.channel_names) & one.named.keys() for one in folders)


def _children(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []


def _folders(folder: Path, fence: Fence) -> Iterator[_Folder]:
    """The folders in a folder, by name."""
    for child in fence.targets_in(str(folder)):
        if child.is_folder:
            yield _look_into(child.path, fence)
        elif child.problem and child.path != str(folder) and os.path.isdir(child.path):
            yield _Folder(child.path, problem=child.problem)


def _look_into(path: str, fence: Fence) -> _Folder:
    found = _Folder(path)
    words: dict[str, list[Target]] = defaultdict(list)
    for target in fence.targets_in(path):
        if target.path == path:
            found.problem = target.problem
        elif is_volume(target.path):
            words[_word(target.path, found.name)].append(target)
    found.others = len(words.pop("", ()))
    found.repeats = sum(len(targets) - 1 for targets in words.values())
    found.named = {word: targets[0] for word, targets in words.items()}
    return found


def _word(path: str, name: str) -> str:
    """`t1` of SUBJECT_t1.nii.gz; empty for a file that is not called like its folder."""
    whole = stem(path)
    return whole[len(name) + 1 :] if whole.startswith(tuple(name + dash for dash in _DASHES)) else ""
