"""What a user writes as `sources` -> a list of volumes to be: one module a form of list."""

from mimscale.ingest.sources.find import find
from mimscale.ingest.sources.source import Found, Source, stem, subject_of

__all__ = ["Found", "Source", "find", "stem", "subject_of"]
