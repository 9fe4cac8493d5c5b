"""A checkpoint of thousands of ranks in one process: what rank 0 does to commit it, and what any rank does to read it.

The other ranks are fakes that report what real ones would; index, manifest, rename and reading are the real ones.

W ranks
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mimscale.bench.verbs import bench_config
from mimscale.train.build import build_pretrain
from mimscale.train.checkpoint import Checkpoints
from mimscale.train.committed import MANIFEST, read_manifest, tags, why_not_loadable
from mimscale.train.config import CheckpointConfig
from mimscale.train.run_dir import RunDir
from mimscale.train.state import KINDS, PartIndex, Piece, SavedState, Snapshot, state_file, write_index
from mimscale.train.zero import shapes_of
from mimscale.world import World

RECIPE = "pretrain_mae_vit_b"
STAGES = (1, 3)  # one range a rank, or one range a rank of every parameter
PART_BYTES = 1  # of each rank's file
_POSITION = {"samples_done": 0}


@cache
def model_shapes() -> dict[str, list[int]]:
    """Parameter -> shape of the recipe's model."""
    with torch.device("meta"):
        return shapes_of(build_pretrain(bench_config([RECIPE], needs_store=False), 1))


def ranges_of_ranks(shapes: Mapping[str, list[int]], ranks: int, stage: int) -> Iterator[list[tuple[str, int, int]]]:
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


def _pieces(ranges: Iterable[tuple[str, int, int]]) -> list[Piece]:
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
    """What a rank does to go on from a checkpoint, with as many ranks as have written it."""
    manifest = read_manifest(tag)
    reason = why_not_loadable(tag, share=(rank, ranks))
    assert reason is None, reason
    saved = SavedState(tag, manifest["files"])
    saved.refuse_other_model(model_shapes())
    saved.fill(pieces)


@contextmanager
def saved(ranks: int, stage: int) -> Iterator[tuple[Path, int, list[Piece]]]:
    """A committed checkpoint in which one rank's file, that of the middle, is there: folder, rank, what it holds."""
    with tempfile.TemporaryDirectory(prefix="mimscale_simulate_") as name:
        tag = committed(RunDir(Path(name)), ranks, stage)
        rank = ranks // 2
        pieces = next(
            _pieces(ranges) for at, ranges in enumerate(ranges_of_ranks(model_shapes(), ranks, stage)) if at == rank
        )
        snapshot = Snapshot(rank, pinned=False)
        snapshot.take(pieces, 1, {})
        entry = snapshot.write(tag)[state_file(rank)]
        _set_entry(tag, rank, ranks, entry)
        yield tag, rank, pieces


def _set_entry(tag: Path, rank: int, ranks: int, entry: dict[str, Any]) -> None:
    """Let the manifest say what was written for `rank`; nobody has written the files of the others."""
    path = tag / MANIFEST
    tree = json.loads(path.read_text())
    assert len(tree["files"]) == ranks + 1
    tree["files"][state_file(rank)] = entry
    path.write_text(json.dumps(tree, indent=2, sort_keys=True))


def parts(ranks: int, stack: ExitStack) -> dict[str, Callable[[], object]]:
    """The parts of a checkpoint that grow with ranks, ready to be timed; `stack` clears up behind them."""
    calls: dict[str, Callable[[], object]] = {}
    for stage in STAGES:
        tag, rank, pieces = stack.enter_context(saved(ranks, stage))

        def commit(stage: int = stage) -> None:
            with tempfile.TemporaryDirectory(prefix="mimscale_simulate_") as name:
                committed(RunDir(Path(name)), ranks, stage)

        def read(tag: Path = tag, rank: int = rank, pieces: list[Piece] = pieces) -> None:
            read_own_part(tag, rank, ranks, pieces)

        calls[f"commit of a checkpoint, ZeRO-{stage}"] = commit
        calls[f"reading it on a rank, ZeRO-{stage}"] = read
    return calls
