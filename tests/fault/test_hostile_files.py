"""Checkpoints, stores and run directories that somebody made to do harm are refused in words."""

import ast
import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fakes import FileEngine, checkpoints_of
from small_segmentation import make_pretrain_run, make_store

from launch import requeue, supervise
from launch.folder import JobFolder, JobRecord
from mimscale import durable
from mimscale.cli import main
from mimscale.errors import CheckpointError, DataError, LaunchError
from mimscale.models.transfer import load_weights
from mimscale.store import layout
from mimscale.store.manifest import CHUNK_MAPS_KEY, load_manifest, write_manifest
from mimscale.store.reader import ShardReader
from mimscale.store.verify import verify
from mimscale.train import committed
from mimscale.train.run_dir import RunDir
from mimscale.world import Process

ROOT = Path(__file__).parents[2]
PICKLERS = ("pickle", "cloudpickle", "marshal", "shelve", "joblib", "dill")
STRANGER = 54_321  # a user id that nobody has


class Payload:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self._mark),)


# --- checkpoints


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "run")
    engine = FileEngine()
    for step in (1, 2):
        engine.state = step
        checkpoints_of(run, engine).save(step, {"samples_done": step})
    return run


def change_manifest(run: RunDir, change) -> None:
    path = run.checkpoints / "step_00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def link_out(run: RunDir, name: str) -> None:
    """The bytes are as they were saved, but they lie elsewhere."""
    path = run.checkpoints / "step_00000002" / name
    path.rename(run.path.parent / "outside")
    path.symlink_to(run.path.parent / "outside")


def link_folder_out(run: RunDir) -> None:
    outside = run.path.parent / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"x")
    (run.checkpoints / "step_00000002" / "folder").symlink_to(outside)
    entry = {"bytes": 1, "sha256": durable.sha256_of_file(outside / "file")}
    change_manifest(run, lambda tree: tree["files"].update({"folder/file": entry}))


HOSTILE_CHECKPOINTS = {
    "a path out of it": lambda run: change_manifest(
        run, lambda tree: tree["files"].update({"../step_00000001/manifest.json": {"bytes": 1, "sha256": ""}})
    ),
    "an absolute path": lambda run: change_manifest(
        run, lambda tree: tree["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}})
    ),
    "a name with a zero byte": lambda run: change_manifest(
        run, lambda tree: tree["files"].update({"a\0b": {"bytes": 1, "sha256": ""}})
    ),
    "files that are a list": lambda run: change_manifest(run, lambda tree: tree.update(files=["weights.safetensors"])),
    "an entry without a hash": lambda run: change_manifest(
        run, lambda tree: tree["files"].update({"weights.safetensors": {"bytes": 1}})
    ),
    "a number for a manifest": lambda run: (run.checkpoints / "step_00000002" / "manifest.json").write_text("7"),
    "a manifest of endless brackets": lambda run: (run.checkpoints / "step_00000002" / "manifest.json").write_text(
        "[" * 200_000
    ),
    "a file that is a link out of it": lambda run: link_out(run, "weights.safetensors"),
    "a folder that is a link out of it": link_folder_out,
    "a link to another folder": lambda run: link_out(run, ""),
}


@pytest.mark.parametrize("kind", HOSTILE_CHECKPOINTS)
def test_a_hostile_checkpoint_is_passed_over_in_words(kind, run, capsys):
    HOSTILE_CHECKPOINTS[kind](run)
    assert committed.newest(run) == run.checkpoints / "step_00000001"
    assert "checkpoint passed over: step_00000002: " in capsys.readouterr().err
    assert checkpoints_of(run, FileEngine()).restore().step == 1


# --- weights and contracts


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return make_pretrain_run(tmp_path_factory.mktemp("runs") / "run", Path("/none"))


@pytest.fixture
def weights(trained, tmp_path) -> Path:
    return shutil.copytree(trained / "checkpoints" / "step_00000005", tmp_path / "weights")


def test_a_pickle_under_the_name_of_safetensors_is_refused_and_not_executed(weights, tmp_path):
    mark = tmp_path / "executed"
    (weights / "weights.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(CheckpointError, match=r"weights.safetensors: damaged"):
        load_weights(weights)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "vit"),
        ("model", [1]),
        ("channels", "1"),
        ("channels", True),
        ("channels", 0),
        ("patch_voxels", [8, 8]),
        ("patch_voxels", [8, 8, -8]),
        ("crop_voxels", {"z": 16}),
        ("class_names", [1, 2]),
        ("datasets", ["a"]),
        ("step", -1),
        ("intensity", "none"),
    ],
)
def test_a_contract_with_a_value_of_another_type_is_refused(key, value, weights):
    path = weights / "contract.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=rf"contract.json: {key}=.* is of another type than it must be"):
        load_weights(weights)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 200_000, '{"contract_version": 1', '{"contract_version": 9}'])
def test_a_contract_that_is_none_is_refused(text, weights):
    (weights / "contract.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"contract\.json: "):
        load_weights(weights)


# --- pickles and code of a run directory


def foreign(path: Path) -> None:
    os.chown(path, STRANGER, -1)


def writable_by_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
SPOILT = [
    pytest.param(foreign, "belongs to user 54321", marks=needs_root),
    pytest.param(writable_by_all, "everybody may write to it", id="writable_by_all"),
]


@pytest.mark.parametrize(("spoil", "text"), SPOILT)
@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/step_00000002/state.pt"])
def test_a_file_that_others_can_write_to_is_told_from_one_that_only_its_user_can(spoil, text, name, run):
    pickled = run.checkpoints / "step_00000002" / "state.pt"
    pickled.write_bytes(b"pickle")
    run.refuse_foreign([pickled, run.path / "not there"], CheckpointError)
    spoil(run.path / name)
    with pytest.raises(CheckpointError, match=text):
        run.refuse_foreign([pickled], CheckpointError)


@pytest.fixture
def job(tmp_path, monkeypatch) -> JobFolder:
    folder = JobFolder(tmp_path / "run" / "logs" / "001")
    folder.path.mkdir(parents=True)
    record = JobRecord(
        verb="pretrain",
        executor="slurm",
        processes=1,
        master_port=None,
        config_hash="0",
        timeout_min=1,
        signal_lead_s=1,
        lost_rank_grace_s=1,
        trains=False,
        submitted_utc="",
        submitter=Process.this(),
        job_id="7",
    )
    folder.write(record)
    folder.task_file().write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return folder


@pytest.mark.parametrize(("spoil", "text"), SPOILT)
@pytest.mark.parametrize("name", ["", "logs/001", "logs/001/task.pkl", "code"])
def test_a_job_does_not_start_from_a_folder_that_others_can_write_to(spoil, text, name, job, capfd):
    job.run.code.mkdir()
    spoil(job.run.path / name)
    assert requeue.start(job) == LaunchError.exit_code
    assert text in capfd.readouterr().out
    assert text in job.read_outcome().message
    assert not (job.path / "7_submitted.pkl").exists()


def test_nothing_is_submitted_into_a_run_directory_that_others_can_write_to(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    writable_by_all(run)
    assert main(["submit", "pretrain", "demo/pretrain", "store=/none", f"run_dir={run}"]) == LaunchError.exit_code
    assert f"{run}: everybody may write to it" in capsys.readouterr().err
    assert list(run.iterdir()) == []


def test_the_supervisor_of_a_local_job_starts_no_rank_from_such_a_folder(job, capfd):
    writable_by_all(job.path)
    assert supervise.main([str(job.path), "false"]) == LaunchError.exit_code
    assert "everybody may write to it" in capfd.readouterr().out
    assert job.read_outcome().exit_code == LaunchError.exit_code
    assert job.read_ranks() == []


def calls_of(path: Path) -> list[tuple[str, set[str]]]:
    """Dotted name and keyword names of every call in a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            found.append((ast.unparse(node.func), {keyword.arg or "**" for keyword in node.keywords}))
    return found


def test_nothing_in_the_package_unpickles_what_lies_in_a_file():
    modules = [*(ROOT / "mimscale").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    assert len(modules) > 100
    for module in modules:
        for name, keywords in calls_of(module):
            place = f"{module.relative_to(ROOT)}: {name}"
            assert name.split(".")[-1] not in ("Unpickler", "read_pickle"), place
            assert name not in {f"{library}.{call}" for library in PICKLERS for call in ("load", "loads", "open")}, (
                place
            )
            assert name != "torch.load" or "weights_only" in keywords, place
            assert name not in ("np.load", "numpy.load") or "allow_pickle" in keywords, place
            assert name not in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load"), place


# --- stores


@pytest.fixture
def store(tmp_path) -> Path:
    return make_store(tmp_path / "data")


@pytest.mark.parametrize("path", ["packs/part-00000.zarr.zip", "packs", "overlays/label/part-00000.zarr.zip"])
def test_a_pack_that_is_a_link_out_of_the_store_is_not_read(path, store, tmp_path):
    (store / path).rename(tmp_path / "outside")
    (store / path).symlink_to(tmp_path / "outside")
    manifest = load_manifest(store)
    row = manifest.row(0)
    overlay = "label" if path.startswith("overlays") else None
    with pytest.raises(DataError, match=r"is a link to .*outside.*, out of the store; put the file itself there"):
        ShardReader(store, manifest).read_volume(row, overlay)
    assert any("out of the store" in bad.reason for bad in verify(store))


def test_a_store_that_is_itself_behind_a_link_and_links_inside_it_are_read(store, tmp_path):
    (store / "packs").rename(store / "packs_of_2024")
    (store / "packs").symlink_to("packs_of_2024")
    (tmp_path / "link").symlink_to(store)
    manifest = load_manifest(tmp_path / "link")
    assert ShardReader(tmp_path / "link", manifest).read_volume(manifest.row(0)).size


@pytest.mark.parametrize("name", ["../../outside", "/etc", "a/b", "", ".hidden", "a\n"])
def test_names_in_a_store_that_lead_elsewhere_are_refused(name, store):
    rows = [load_manifest(store).row(index) for index in range(3)]
    write_manifest(store, [replace(rows[0], id=name), *rows[1:]])
    with pytest.raises(DataError, match=r"manifest\.parquet: .* is no name that may be part of a path"):
        load_manifest(store)
    with pytest.raises(DataError, match="is no name that may be part of a path"):
        load_manifest(store, ["id"])
    write_manifest(store, [replace(rows[0], overlays={name: rows[0].overlays["label"]}), *rows[1:]])
    with pytest.raises(DataError, match="is no name that may be part of a path"):
        load_manifest(store)
    write_manifest(store, rows)
    info = json.loads(layout.info_path(store).read_text())
    info["overlays"] = {name: info["overlays"]["label"]}
    layout.info_path(store).write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"store\.json: overlay .* is no name of a folder"):
        layout.read_info(store)


def test_chunk_maps_at_another_place_are_refused(store):
    path = layout.manifest_path(store)
    table = pq.read_table(path)
    said = json.dumps({"sha256": "/../../outside", "bytes": 1}).encode()
    pq.write_table(table.replace_schema_metadata({CHUNK_MAPS_KEY: said}), path)
    with pytest.raises(DataError, match="is no name that may be part of a path"):
        load_manifest(store)


@pytest.mark.parametrize(
    ("name", "compression", "text"),
    [
        ("../outside", zipfile.ZIP_STORED, "leads elsewhere"),
        ("/outside", zipfile.ZIP_STORED, "leads elsewhere"),
        ("aaaa/../../outside", zipfile.ZIP_STORED, "leads elsewhere"),
        ("aaaa\\..\\outside", zipfile.ZIP_STORED, "leads elsewhere"),
        ("aaaa/bomb", zipfile.ZIP_DEFLATED, "is compressed"),
    ],
)
def test_a_pack_whose_entries_lead_elsewhere_or_grow_is_not_unzipped(name, compression, text, store, tmp_path, capsys):
    with zipfile.ZipFile(layout.pack_path(store, 0), "a") as pack:
        pack.writestr(zipfile.ZipInfo(name), bytes(10_000), compress_type=compression)
    out = tmp_path / "unzipped" / "out"
    assert main(["export", str(store), "part-00000", str(out)]) == DataError.exit_code
    assert text in capsys.readouterr().err
    assert not out.exists()
    assert not [path for path in tmp_path.rglob("*") if path.name in ("outside", "bomb")]
