"""Files through a network without a store: the classes that the same file gets from a store, on its own grid."""

import hashlib
import json

import nibabel
import numpy as np
import pytest
import torch
from predict_samples import REGIONS, ZSCORE, ingested, run_on, write_sources
from small_segmentation import SOURCES, make_finetune_run, make_store

from mimscale.cli import main
from mimscale.evaluate.config import EvaluateConfig
from mimscale.evaluate.run import evaluate
from mimscale.store.layout import read_info
from mimscale.store.manifest import load_manifest
from mimscale.stream.config import StreamConfig
from mimscale.train.build import weights_contract
from mimscale.train.config import load_run_config

WORDS = ["threads=1", "batch=4"]
STORES = {
    "as scanned": {},
    "cropped": {"crop": "foreground", "crop_margin_mm": 2.0},
    "resampled": {"spacing_mm": (1.5, 1.0, 1.2), "crop": "foreground", "crop_margin_mm": 4.0},
}
RUNS = {
    "classes": {},
    "regions": {"regions": REGIONS},
    "another spacing": {"stream": StreamConfig(target_spacing_mm=(1.7, 1.1, 0.9))},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources") / "files")


@pytest.fixture(scope="module")
def stores(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return {
        name: ingested(folder / str(number), sources.values(), ZSCORE, **fields)
        for number, (name, fields) in enumerate(STORES.items())
    }


def predict(run, *words):
    runs = run if isinstance(run, list) else [run]
    return main(["predict", *map(str, runs), *map(str, words), *WORDS])


def evaluated(run, store, sources):
    """Folder or file of each source's prediction by `mimscale evaluate`."""
    evaluate(EvaluateConfig(run_dir=run, split="train", threads=1, batch=4, pictures=0, store_grid=False))
    manifest = load_manifest(store)
    rows = {row.source_sha256: row.id for row in (manifest.row(index) for index in range(len(sources)))}
    ids = {name: rows[hashlib.sha256(image.read_bytes()).hexdigest()] for name, (image, _) in sources.items()}
    return {name: run / "evaluate" / "predictions" / id_ for name, id_ in ids.items()}


@pytest.mark.parametrize("run_name", RUNS)
@pytest.mark.parametrize("store_name", STORES)
def test_a_file_gets_to_the_bit_what_evaluation_gives_it_from_a_store(store_name, run_name, stores, sources, tmp_path):
    store = stores[store_name]
    run = run_on(tmp_path / "run", store, **RUNS[run_name])
    wanted = evaluated(run, store, sources)
    out = tmp_path / "out"
    assert predict(run, *(image for image, _ in sources.values()), f"out={out}") == 0
    values = set()
    for name, (image, _) in sources.items():
        source = nibabel.load(image)
        files = (
            {f"{name}/{region}.nii.gz": wanted[name] / f"{region}.nii.gz" for region in REGIONS}
            if run_name == "regions"
            else {f"{name}.nii.gz": wanted[name].with_suffix(".nii.gz")}
        )
        for path, other in files.items():
            assert (out / path).read_bytes() == other.read_bytes()
            mask = nibabel.load(out / path)
            assert np.array_equal(mask.affine, source.affine)
            assert mask.shape == source.shape
            values |= set(np.unique(np.asarray(mask.dataobj)).tolist())
    assert len(values) > 1, "a network that says the same everywhere proves nothing"
    assert len(list(out.iterdir())) == len(SOURCES)


def test_folds_decide_by_the_mean_of_their_probabilities(stores, sources, tmp_path):
    store = stores["as scanned"]
    runs = [run_on(tmp_path / f"fold{seed}", store, seed=seed) for seed in range(3)]
    images = [image for image, _ in sources.values()]
    for number, run in enumerate(runs):
        assert predict(run, *images, f"out={tmp_path / str(number)}") == 0
    assert predict(runs, *images, f"out={tmp_path / 'all'}") == 0
    assert predict([runs[0], runs[0]], *images, f"out={tmp_path / 'twice'}") == 0
    name = next(iter(SOURCES))
    alone = [np.asarray(nibabel.load(tmp_path / str(n) / f"{name}.nii.gz").dataobj) for n in range(3)]
    together = np.asarray(nibabel.load(tmp_path / "all" / f"{name}.nii.gz").dataobj)
    agreed = (alone[0] == alone[1]) & (alone[1] == alone[2])
    assert not agreed.all()
    assert np.array_equal(together[agreed], alone[0][agreed])
    assert any((together != one).any() for one in alone)
    twice = np.asarray(nibabel.load(tmp_path / "twice" / f"{name}.nii.gz").dataobj)
    assert (twice == alone[0]).mean() > 0.9999, "a run and itself say what it says alone, but for rounding"


def test_older_weights_ask_the_store_how_volumes_were_stored_and_say_so_when_it_is_gone(
    stores, sources, tmp_path, capsys
):
    image = next(iter(sources.values()))[0]
    outs = []
    for number, changes in enumerate(({}, {"stored_as": None})):
        run = run_on(tmp_path / f"run{number}", stores["resampled"])
        tag = next((run / "checkpoints").glob("step_*"))
        contract = json.loads((tag / "contract.json").read_text()) | changes
        rewrite_contract(tag, {key: value for key, value in contract.items() if value is not None})
        outs.append(tmp_path / f"out{number}")
        assert predict(run, image, f"out={outs[-1]}") == 0
    first, second = ((out / image.name).read_bytes() for out in outs)
    assert first == second
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(stores["resampled"]), str(tmp_path / "gone")))
    capsys.readouterr()
    assert predict(run, image, f"out={tmp_path / 'out3'}") == 2
    assert "its contract does not say at what spacing volumes were stored" in capsys.readouterr().err
    assert predict(run, image, f"out={tmp_path / 'out3'}", f"store={stores['resampled']}") == 0
    assert (tmp_path / "out3" / image.name).read_bytes() == first


def test_training_writes_into_the_contract_how_its_store_holds_volumes(stores, tmp_path):
    run = run_on(tmp_path / "run", stores["resampled"])
    words = {"channels": 1, "step": 1, "precision": "fp32", "overlay": "label", "datasets": [], "spacing_mm": (1, 1, 1)}
    contract = weights_contract(load_run_config(run), read_info(stores["resampled"]), **words)
    assert contract["stored_as"] == {"spacing_mm": [1.5, 1.0, 1.2], "crop": "foreground", "crop_margin_mm": 4.0}


def rewrite_contract(tag, contract):
    path = tag / "contract.json"
    path.write_text(json.dumps(contract))
    manifest = json.loads((tag / "manifest.json").read_text())
    data = path.read_bytes()
    manifest["files"]["contract.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (tag / "manifest.json").write_text(json.dumps(manifest))


def test_channels_come_as_one_file_of_four_axes_or_as_a_file_each(tmp_path):
    store = make_store(tmp_path / "data")
    run = make_finetune_run(tmp_path / "run", store, channels=2)
    image = nibabel.load(store.parent / "sources" / "aaaa.nii.gz")
    voxels = np.asarray(image.dataobj)
    cases = tmp_path / "cases"
    cases.mkdir()
    for number, one in enumerate((voxels, voxels[::-1])):
        nibabel.save(nibabel.Nifti1Image(one, image.affine), cases / f"case_{number:04d}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.stack([voxels, voxels[::-1]], -1), image.affine), cases / "four.nii.gz")
    apart = f"{cases}/case_0000.nii.gz,{cases}/case_0001.nii.gz"
    assert predict(run, apart, cases / "four.nii.gz", f"out={tmp_path / 'out'}") == 0
    one, other = (nibabel.load(tmp_path / "out" / name) for name in ("case.nii.gz", "four.nii.gz"))
    assert one.shape == voxels.shape
    assert np.array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))


def test_results_are_json_on_stdout_with_what_was_written(tmp_path, capsys):
    store = make_store(tmp_path / "data")
    run = make_finetune_run(tmp_path / "run", store)
    assert predict(run, store.parent / "sources" / "aaaa.nii.gz", f"out={tmp_path / 'out'}", "--json") == 0
    out, err = capsys.readouterr()
    tree = json.loads(out)
    (result,) = tree["results"]
    assert tree["failed"] == 0
    assert result["written"] == [str(tmp_path / "out" / "aaaa.nii.gz")]
    assert "1 of 1 inputs done" in err


def test_inputs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    store = make_store(tmp_path / "data")
    run = make_finetune_run(tmp_path / "run", store)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "scan.nii.gz").write_bytes((store.parent / "sources" / "aaaa.nii.gz").read_bytes())
    assert predict(run, tmp_path / "one", tmp_path / "two", f"out={tmp_path / 'out'}") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one_scan.nii.gz", "two_scan.nii.gz"]


def test_a_pattern_that_the_shell_left_alone_stands_for_its_files(tmp_path):
    store = make_store(tmp_path / "data")
    run = make_finetune_run(tmp_path / "run", store)
    assert predict(run, store.parent / "sources" / "[ab]???.nii.gz", f"out={tmp_path / 'out'}") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["aaaa.nii.gz", "bbbb.nii.gz"]


def test_a_network_that_answers_nan_fails_its_input_and_says_which_run(tmp_path, capsys, monkeypatch):
    from mimscale.evaluate import weights

    store = make_store(tmp_path / "data")
    run = make_finetune_run(tmp_path / "run", store)
    real = weights.load_model

    def broken(*arguments):
        model, contract = real(*arguments)
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return model, contract

    monkeypatch.setattr(weights, "load_model", broken)
    assert predict(run, store.parent / "sources" / "aaaa.nii.gz", f"out={tmp_path / 'out'}") == 3
    assert "run: the network answered with numbers that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
