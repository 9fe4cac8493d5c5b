"""The training state on disk, cut and joined in every way."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mimscale.errors import CheckpointError
from mimscale.train.state import INDEX, KINDS, Piece, SavedState, Snapshot, state_file, write_index
from mimscale.train.zero import share_of_copies

SHAPES = {"a": [3, 5], "b": [7], "c": [1], "d": [2, 2, 2]}


def numbers() -> dict[str, dict[str, torch.Tensor]]:
    """Parameter -> kind -> flat tensor."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: {kind: torch.randn(torch.Size(shape).numel(), generator=generator) for kind in KINDS}
        for name, shape in SHAPES.items()
    }


def pieces_of(state, rank: int, size: int, *, each_parameter: bool) -> list[Piece]:
    """The ranges of a rank when the whole state, or each parameter, is cut into `size` parts."""
    if not each_parameter:
        whole = (Piece(name=name, start=0, tensors=kinds) for name, kinds in state.items())
        return list(share_of_copies(whole, rank, size))
    cut = []
    for name, kinds in state.items():
        share = -(-len(kinds["weights"]) // size)
        tensors = {kind: values[rank * share : (rank + 1) * share] for kind, values in kinds.items()}
        if len(tensors["weights"]):
            cut.append(Piece(name=name, start=rank * share, tensors=tensors))
    return cut


def save(folder, size: int, *, each_parameter: bool) -> list[str]:
    folder.mkdir(exist_ok=True)
    state, parts = numbers(), []
    for rank in range(size):
        snapshot = Snapshot(rank, pinned=False)
        snapshot.take(pieces_of(state, rank, size, each_parameter=each_parameter), 17, {})
        (entry,) = snapshot.write(folder).values()
        assert entry["bytes"] == (folder / state_file(rank)).stat().st_size == snapshot.file_bytes
        parts.append(snapshot.index())
    write_index(folder, parts, SHAPES)
    return [state_file(rank) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 40])  # 40 ranks are more than there are elements
@pytest.mark.parametrize("each_parameter", [False, True])
def test_a_state_saved_by_any_number_of_ranks_is_read_by_any_other(tmp_path, size, each_parameter):
    saved = SavedState(tmp_path, save(tmp_path, size, each_parameter=each_parameter))
    assert saved.adam_steps == 17
    for readers in (1, 2, 5):
        for cut in (False, True):
            state = {
                name: {kind: torch.zeros_like(t) for kind, t in kinds.items()} for name, kinds in numbers().items()
            }
            for rank in range(readers):
                saved.fill(pieces_of(state, rank, readers, each_parameter=cut))
            assert all(torch.equal(state[name][kind], numbers()[name][kind]) for name in SHAPES for kind in KINDS)
    assert torch.equal(saved.full("d", "exp_avg"), numbers()["d"]["exp_avg"].reshape(2, 2, 2))


def test_a_part_is_an_ordinary_safetensors_file(tmp_path):
    save(tmp_path, 1, each_parameter=False)
    tensors = load_file(tmp_path / state_file(0))
    assert torch.equal(tensors["exp_avg_sq"], torch.cat([kinds["exp_avg_sq"] for kinds in numbers().values()]))


def test_the_memory_of_a_snapshot_is_used_again_and_holds_a_copy(tmp_path):
    state = numbers()
    snapshot = Snapshot(0, pinned=False)
    places = set()
    for _ in range(2):
        snapshot.take(pieces_of(state, 0, 1, each_parameter=False), 1, {})
        places.add(snapshot._buffer.data_ptr())
    state["a"]["weights"].zero_()
    snapshot.write(tmp_path)
    assert load_file(tmp_path / state_file(0))["weights"][:15].abs().sum() > 0
    assert len(places) == 1


def test_ranks_that_made_different_numbers_of_updates_do_not_commit(tmp_path):
    parts = []
    for rank, steps in enumerate((3, 4)):
        snapshot = Snapshot(rank, pinned=False)
        snapshot.take([], steps, {})
        parts.append(snapshot.index())
    with pytest.raises(CheckpointError, match=r"different numbers of updates: \[3, 4\]"):
        write_index(tmp_path, parts, SHAPES)


def test_another_model_is_named_by_its_first_parameter(tmp_path):
    saved = SavedState(tmp_path, save(tmp_path, 2, each_parameter=False))
    saved.refuse_other_model(SHAPES)
    with pytest.raises(CheckpointError, match=r"another model; 2 parameter\(s\) differ, b is \[7\] there and \[8\]"):
        saved.refuse_other_model(SHAPES | {"b": [8], "z": [1]})


def read_all(folder, files):
    saved = SavedState(folder, files)
    return [saved.full(name, "weights") for name in SHAPES]


def hole(tree):
    tree["ranges"]["b"].pop()


def beyond_the_end(tree):
    tree["ranges"]["b"][-1][3] = 10**6


def before_the_beginning(tree):
    tree["ranges"]["b"][0][3] = -5


def file_that_is_none(tree):
    tree["ranges"]["b"][0][2] = 99


def file_outside(tree):
    tree["files"][0] = "../../../etc/passwd"


def text_for_a_number(tree):
    tree["ranges"]["b"][0][0] = "first"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (hole, "b has no elements"),
        (beyond_the_end, "does not fit file"),
        (before_the_beginning, "does not fit file"),
        (file_that_is_none, "does not fit file"),
        (file_outside, r"names \['../../../etc/passwd'\], which the manifest does not hold"),
        (text_for_a_number, "no readable index"),
        (lambda tree: tree.clear(), "no readable index"),
    ],
)
def test_an_index_that_lies_is_refused_in_words(tmp_path, damage, reason):
    files = save(tmp_path, 2, each_parameter=False)
    tree = json.loads((tmp_path / INDEX).read_text())
    damage(tree)
    (tmp_path / INDEX).write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=reason):
        read_all(tmp_path, files)


def test_a_pickle_in_place_of_a_part_is_not_loaded(tmp_path):
    files = save(tmp_path, 1, each_parameter=False)
    torch.save({"weights": torch.zeros(3)}, tmp_path / files[0])
    with pytest.raises(CheckpointError, match="does not fit file 0"):
        SavedState(tmp_path, files).full("a", "weights")
