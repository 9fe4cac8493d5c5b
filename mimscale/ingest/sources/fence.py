"""Paths that a list names: resolved against the list's folder, and kept inside it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mimscale.ingest.sources.files import Problem, companions_of, is_volume


@dataclass(frozen=True)
class Target:
    """Where a path of a list leads."""

    path: str
    companions: tuple[str, ...] = ()  # further files that it cannot be read without
    problem: Problem | None = None
    is_folder: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """The file and its companions."""
        return (self.path, *self.companions)


def typed(path: str) -> Target:
    """The target of a path that the user typed, or that a pattern of theirs matched: it may lead anywhere."""
    if not is_volume(path):
        return Target(path, is_folder=os.path.isdir(path))
    companions, problem = companions_of(path)
    return Target(path, companions, problem)


@dataclass(frozen=True)
class _Folder:
    kinds: dict[str, str] = field(default_factory=dict)  # name -> "file", "folder" or "link"
    problem: Problem | None = None


class Fence:
    """Resolves the paths of one list.

    A path that leaves the list's folder (`..`, an absolute path, a link) is a problem, unless `allow_outside`: a
    table that somebody sent must not make the ingest read what its author could not.

    Asks the file system once a folder, not once a file: a list may have 400 000 of them, and each question costs a
    round trip to a metadata server.
    """

    def __init__(self, folder: Path, allow_outside: bool) -> None:
        self._folder = str(folder)
        self._root = os.path.realpath(folder)
        self._allow_outside = allow_outside
        self._known: dict[str, _Folder] = {}

    def target(self, text: str) -> Target:
        """Where `text` leads. Never raises: what is wrong with it is its `problem`."""
        path = os.path.join(self._folder, text)
        if "//" in path or "/./" in path or path.endswith("/"):  # `..` stays: behind a link it means another folder
            path = str(Path(path))  # slower: as many as lists are long
        try:
            target = self._resolved(path)
        except ValueError:  # a zero byte, or what is no Unicode
            return Target(path, problem=("missing_file", "no path can be so"))
        if target.problem or target.is_folder or not is_volume(path):
            return target
        companions, problem = companions_of(path)
        problems = [self._resolved(companion).problem for companion in companions]
        return Target(path, companions, problem or next(filter(None, problems), None))

    def _resolved(self, path: str) -> Target:
        parent, name = os.path.split(path)
        if name in ("", ".."):  # names a folder by its place, which only its real path tells
            return self._followed(path)
        folder = self._look_into(parent)
        if folder.problem is not None:
            return Target(path, problem=folder.problem)
        kind = folder.kinds.get(name)
        if kind is None:
            return Target(path, problem=("missing_file", "no such file"))
        return self._followed(path) if kind == "link" else Target(path, is_folder=kind == "folder")

    def targets_in(self, folder: str) -> Iterator[Target]:
        """Everything that is not hidden in a folder, by name.

        Nothing when there is no such folder; the folder itself, with its problem, when it must not or cannot be read.
        """
        listed = self._look_into(folder)
        if listed.problem and listed.problem[0] != "missing_file":
            yield Target(folder, problem=listed.problem)
        for name in sorted(listed.kinds):
            if not name.startswith("."):
                yield self.target(os.path.join(folder, name))

    def is_inside(self, real_path: str) -> bool:
        """True when a path without links and `..` may be read."""
        return self._allow_outside or self.is_below(real_path)

    def is_below(self, real_path: str) -> bool:
        """True when a path without links and `..` lies in the list's folder."""
        return real_path == self._root or real_path.startswith(self._root.rstrip(os.sep) + os.sep)

    def _followed(self, path: str) -> Target:
        real = os.path.realpath(path)
        if not self.is_inside(real):
            return Target(path, problem=_OUTSIDE)
        if not os.path.exists(real):
            return Target(path, problem=("missing_file", "no such file"))
        return Target(path, is_folder=os.path.isdir(real))

    def _look_into(self, parent: str) -> _Folder:
        if parent not in self._known:
            self._known[parent] = self._listed(parent)
        return self._known[parent]

    def _listed(self, parent: str) -> _Folder:
        if not self.is_inside(os.path.realpath(parent)):
            return _Folder(problem=_OUTSIDE)
        try:
            with os.scandir(parent) as entries:
                return _Folder({entry.name: _kind(entry) for entry in entries})
        except (FileNotFoundError, NotADirectoryError):
            return _Folder(problem=("missing_file", "no such file: its folder is not there"))
        except OSError as error:
            return _Folder(problem=("unreadable", f"its folder: {error.strerror}"))


_OUTSIDE = (
    "outside_source",
    "leads out of the folder of its list; allow_outside=true permits it where the list is trusted",
)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "link"
    return "folder" if entry.is_dir(follow_symlinks=False) else "file"
