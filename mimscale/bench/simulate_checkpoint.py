"""A checkpoint of thousands of ranks in one process: what rank 0 does to commit it, and what any rank does to read it.

The other ranks are fakes that report what real ones would; index, manifest, rename and reading are the real ones.

W ranks
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mimscale import durable
from mimscale.bench.verbs import bench_config
from mimscale.models.tensor_file import header
from mimscale.train.build import build_pretrain
from mimscale.train.checkpoint import Checkpoints
from mimscale.train.committed import MANIFEST, read_manifest, tags, why_not_loadable
from mimscale.train.config import CheckpointConfig
from mimscale.train.run_dir import RunDir
from mimscale.train.state import KINDS, PartIndex, Piece, SavedState, state_file, write_index
from mimscale.train.zero import shapes_of
from mimscale.world import World

RECIPE = "pretrain_mae_vit_b"
STAGES = (1, 3)  # one range a rank, or one range a rank of every parameter
PART_BYTES = 1  # of each rank's file
_POSITION = {"samples_done": 0}
Range = tuple[str, int, int]  # parameter, first element, elements


@cache
def model_shapes() -> dict[str, list[int]]:
    """Parameter -> shape of the recipe's model."""
    with torch.device("meta"):
        return shapes_of(build_pretrain(bench_config([RECIPE], needs_store=False), 1))


def ranges_of_ranks(shapes: Mapping[str, list[int]], ranks: int, stage: int) -> Iterator[list[Range]]:
    """What each rank holds, in rank order: parameter, first element, elements.

    Stages 1 and 2 cut all parameters together into W shares, stage 3 each of them.
    """
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    if stage == 3:
        for rank in range(ranks):
            shares = ((name, -(-size // ranks), size) for name, size in sizes.items())
            yield [
                (name, rank * share, min(share, size - rank * share))
                for name, share, size in shares
                if rank * share < size
            ]
        return
    total, names = sum(sizes.values()), iter(sizes.items())
    name, size = next(names)
    done = begin = 0
    for rank in range(ranks):
        left, ranges = total * (rank + 1) // ranks - total * rank // ranks, []
        while left:
            if begin == size:
                name, size = next(names)
                begin = 0
            taken = min(left, size - begin)
            ranges.append((name, begin, taken))
            begin, left, done = begin + taken, left - taken, done + taken
        yield ranges
    assert done == total


def _pieces(ranges: Iterable[Range]) -> list[Piece]:
    return [
        Piece(name=name, start=start, tensors={kind: torch.zeros(elements) for kind in KINDS})
        for name, start, elements in ranges
    ]


@dataclass(frozen=True)
class ManyRanks:
    """Rank 0 of many: the others have written as much as it has; see `mimscale.train.ranks.Ranks`."""

    world: World
    stage: int

    def gather(self, item: Any) -> list[Any]:
        """The same of every rank."""
        return [item] * self.world.size

    def gather_to_first(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """The report of every rank, as rank 0 gets them."""
        reports = []
        for rank, ranges in enumerate(ranges_of_ranks(model_shapes(), self.world.size, self.stage)):
            own = {} if rank else item["files"]
            files = {**own, state_file(rank): {"bytes": item["needed_bytes"], "sha256": f"{rank:064x}"}}
            index = PartIndex(adam_steps=1, ranges=ranges)
            reports.append({**item, "rank": rank, "files": files, "index": index})
        return reports

    def first_does(self, action: Callable[[], Any]) -> Any:
        """Rank 0 does it."""
        return action()


@dataclass(frozen=True)
class _Part:
    """What rank 0 would write; the ranks' own work is none of the commit's."""

    full_weights: Mapping[str, Any]
    file_bytes = PART_BYTES

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Nothing."""
        return {}

    def index(self) -> PartIndex:
        """Nothing."""
        return PartIndex(adam_steps=1, ranges=[])


@dataclass(frozen=True)
class FakeEngine:
    """See `mimscale.train.checkpoint.Saveable`."""

    zero_stage: int
    precision = "fp32"

    def snapshot(self) -> Any:
        """Rank 0's part."""
        return _Part({})

    def write_index(self, folder: Path, parts: list[Any]) -> Path:
        """The real index."""
        return write_index(folder, parts, model_shapes())

    def load(self, folder: Path, files: Iterable[str]) -> None:
        """Nobody restores here."""
        raise NotImplementedError


def committed(run: RunDir, ranks: int, stage: int, step: int = 1) -> Path:
    """Commit a checkpoint of so many ranks in a run directory; returns its folder."""
    many = ManyRanks(World(rank=0, size=ranks, local_rank=0, local_size=min(8, ranks), node="simulated"), stage)
    config = CheckpointConfig(mode="sync", every_steps=1)
    Checkpoints(run, config, FakeEngine(stage), many, lambda *_: []).save(step, _POSITION)  # type: ignore[arg-type]
    return tags(run)[0]


def read_own_part(tag: Path, rank: int, ranks: int, pieces: list[Piece]) -> None:
    """What one of `ranks` ranks does to go on from a checkpoint, whatever number of ranks has written it."""
    manifest = read_manifest(tag)
    reason = why_not_loadable(tag, share=(rank, ranks))
    assert reason is None, reason
    saved = SavedState(tag, manifest["files"])
    saved.refuse_other_model(model_shapes())
    saved.fill(pieces)


@contextmanager
def saved(ranks: int, stage: int, readers: int | None = None) -> Iterator[tuple[Path, int, list[Piece]]]:
    """A committed checkpoint of `ranks` ranks, in which those files are there that one reader of `readers` reads.

    The reader is that in the middle; `readers` is `ranks` unless a run goes on with another number of them.

    Yields:
        The checkpoint's folder, the reader's number, what it holds (all zero, as the files are).
    """
    readers = readers or ranks
    with tempfile.TemporaryDirectory(prefix="mimscale_simulate_") as name:
        tag = committed(RunDir(Path(name)), ranks, stage)
        reader = readers // 2
        own = next(islice(ranges_of_ranks(model_shapes(), readers, stage), reader, None))
        _write_parts(tag, ranks, stage, own, share=(reader, readers))
        yield tag, reader, _pieces(own)


def _write_parts(tag: Path, ranks: int, stage: int, wanted: list[Range], share: tuple[int, int]) -> None:
    """Write the files of the ranks that hold a part of `wanted`, and those that the reader of `share` verifies.

    Their zeros take no place on the disk. The manifest then says what was written; the other files nobody has written.
    """
    path = tag / MANIFEST
    tree = json.loads(path.read_text())
    assert len(tree["files"]) == ranks + 1
    verified = set(sorted(tree["files"])[share[0] :: share[1]])
    ends = {name: (start, start + elements) for name, start, elements in wanted}
    for rank, ranges in enumerate(ranges_of_ranks(model_shapes(), ranks, stage)):
        file = tag / state_file(rank)
        holds = any(
            name in ends and start < ends[name][1] and ends[name][0] < start + elements
            for name, start, elements in ranges
        )
        if holds or file.name in verified:
            own = torch.empty(sum(elements for _, _, elements in ranges), device="meta")
            head = header(dict.fromkeys(KINDS, own))
            with file.open("wb") as opened:
                opened.write(head)
                opened.truncate(len(head) + len(KINDS) * own.nbytes)
            sha256 = durable.sha256_of_file(file) if file.name in verified else "0" * 64
            tree["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256}
    path.write_text(json.dumps(tree, indent=2, sort_keys=True))


def parts(ranks: int, stack: ExitStack) -> dict[str, Callable[[], object]]:
    """The parts of a checkpoint that grow with ranks, ready to be timed; `stack` clears up behind them."""
    calls: dict[str, Callable[[], object]] = {}
    for stage in STAGES:

        def commit(stage: int = stage) -> None:
            with tempfile.TemporaryDirectory(prefix="mimscale_simulate_") as name:
                committed(RunDir(Path(name)), ranks, stage)

        calls[f"commit of a checkpoint, ZeRO-{stage}"] = commit
        for name, readers in (("reading it on a rank", ranks), ("going on with half the ranks", max(1, ranks // 2))):
            tag, reader, pieces = stack.enter_context(saved(ranks, stage, readers))
            calls[f"{name}, ZeRO-{stage}"] = partial(read_own_part, tag, reader, readers, pieces)
    return calls
