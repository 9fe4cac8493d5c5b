"""Archives without voxels: what `sources` names is listed, and no volume is opened."""

import json
from contextlib import contextmanager
from pathlib import Path

from mimscale.config import build_config
from mimscale.ingest import sources
from mimscale.ingest.config import IngestConfig


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def write_json(path, tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return str(path)


def found_in(wanted, **options):
    """What `mimscale ingest` finds for the `sources` of a recipe."""
    wanted = str(wanted) if isinstance(wanted, Path) else wanted
    config = build_config(IngestConfig, {"sources": wanted, "out": "store", **options}, "test")
    return sources.find(config.sources, config)


def names_of(found):
    return [sources.stem(source.channels[0][0]) for source in found.sources]


def problems_of(found):
    """Reason by name of the first file; None for what can be opened."""
    return {sources.stem(one.channels[0][0]): one.problem[0] if one.problem else None for one in found.sources}


@contextmanager
def counted_calls(monkeypatch, module, *names):
    """How often functions of a module are called inside the block."""
    counts = dict.fromkeys(names, 0)
    with monkeypatch.context() as patch:
        for name in names:
            real = getattr(module, name)

            def counting(*args, real=real, name=name, **kwargs):
                counts[name] += 1
                return real(*args, **kwargs)

            patch.setattr(module, name, counting)
        yield counts
