"""Sources -> hashed sources -> parts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mimscale import durable
from mimscale.ingest.config import IngestConfig
from mimscale.ingest.sources.source import Source


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """One source of a plan."""

    image: str
    label: str | None
    subject: str  # as the file name says; never written into the store
    sha256: str  # of the image's bytes (of its path, when there are none to read)
    label_sha256: str | None
    size_bytes: int
    problem: tuple[str, str] | None = None  # reason and detail, when a file could not even be hashed

    @property
    def id(self) -> str:
        """The volume id."""
        return self.sha256[:16]


def plan_source(source: Source) -> PlannedSource:
    """Hash one source. Files that are missing or cannot be read become a `problem`, not an error."""
    problem = source.problem
    image, label = source.channels[0][0], source.label[0] if source.label else None
    if problem is None and len(source.channels) > 1:
        problem = ("not_3d", f"{len(source.channels)} channel files; one is read")
    sizes, hashes = [], []
    for kind, path in (("image", image), ("label", label)):
        digest = None
        if path is not None and source.problem is None:
            try:
                digest = durable.sha256_of_file(Path(path))
                sizes.append(Path(path).stat().st_size)
            except FileNotFoundError:
                problem = problem or ("missing_file", f"no such {kind} file")
            except OSError as error:
                problem = problem or ("unreadable", f"{kind}: {error.strerror}")
        hashes.append(digest)
    return PlannedSource(
        image=image,
        label=label,
        subject=source.subject,
        sha256=hashes[0] or hashlib.sha256(f"no bytes at {image}".encode()).hexdigest(),
        label_sha256=hashes[1],
        size_bytes=sum(sizes),
        problem=problem,
    )


def plan_parts(sources: Sequence[PlannedSource], config: IngestConfig) -> list[list[PlannedSource]]:
    """Which sources go into which part: a hash of a source's bytes decides, so neither workers nor order matter."""
    total_bytes = sum(source.size_bytes for source in sources)
    count = config.parts or max(1, -(-total_bytes // config.part_bytes))
    parts: list[list[PlannedSource]] = [[] for _ in range(count)]
    # Of equal images a labelled one comes first, so that it is the one that is kept.
    by_content = sorted(sources, key=lambda one: (one.sha256, not one.label_sha256, one.label_sha256 or "", one.image))
    for source in by_content:
        parts[int(source.sha256[16:32], 16) % count].append(source)
    return parts
