import json

import nibabel
import numpy as np
import pytest
import safetensors.torch
import zarr
from small_segmentation import SOURCES, make_finetune_run, make_pretrain_run, make_store

from mimscale.cli import main
from mimscale.evaluate.config import EvaluateConfig
from mimscale.evaluate.run import evaluate
from mimscale.models.transfer import load_weights
from mimscale.store import layout


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("volume", SOURCES)
@pytest.mark.parametrize("overlay", [None, "label"])
def test_an_exported_volume_is_the_source_file_again(volume, overlay, store, tmp_path):
    words = [str(store), volume, str(tmp_path / "out.nii.gz")] + ([f"overlay={overlay}"] if overlay else [])
    assert main(["export", *words]) == 0
    name = f"{volume}_label.nii.gz" if overlay else f"{volume}.nii.gz"
    source, exported = nibabel.load(store.parent / "sources" / name), nibabel.load(tmp_path / "out.nii.gz")
    assert np.array_equal(np.asarray(exported.dataobj), np.asarray(source.dataobj))
    assert exported.get_data_dtype() == source.get_data_dtype()
    assert np.array_equal(exported.affine, source.affine)


def test_two_exports_of_a_volume_have_the_same_bytes(store, tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        assert main(["export", str(store), "bbbb", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_an_uncompressed_nifti_can_be_asked_for(store, tmp_path):
    assert main(["export", str(store), "aaaa", str(tmp_path / "out.nii")]) == 0
    assert nibabel.load(tmp_path / "out.nii").shape == SOURCES["aaaa"][1]


def test_an_unzipped_pack_is_a_zarr_group_of_its_volumes(store, tmp_path, capsys):
    assert main(["export", str(store), "part-00000", str(tmp_path / "pack"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": [str(tmp_path / "pack")]}
    group = zarr.open_group(tmp_path / "pack", mode="r")
    for name, (_, shape, _) in SOURCES.items():
        assert sorted(group[name]["0"].shape[1:]) == sorted(shape)
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_exported_weights_are_those_of_the_checkpoint_with_contract_and_card(store, tmp_path):
    run = make_finetune_run(tmp_path / "run", store)
    evaluate(EvaluateConfig(threads=1, run_dir=run, batch=4, pictures=0, save_predictions=False, store_grid=False))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "contract.json",
        "weights.safetensors",
    ]
    tensors, contract = load_weights(tmp_path / "out")
    saved = safetensors.torch.load_file(run / "checkpoints" / "step_00000005" / "weights.safetensors")
    assert tensors.keys() == saved.keys()
    assert contract["class_names"] == ["background", "grey", "white"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "UNETR" in card
    assert "On 3 whole val volumes" in card
    assert "init_from=" in card


def test_a_card_of_weights_that_were_never_evaluated_says_so(store, tmp_path):
    run = make_pretrain_run(tmp_path / "run", store)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "have not been evaluated" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["{store}", "zzzz", "{tmp}/out.nii.gz"], 3, "volume 'zzzz': not among the 3 volumes"),
        (["{store}", "aaaa", "{tmp}/out.nii.gz", "overlay=lesion"], 3, "has no overlay 'lesion'"),
        (["{store}", "aaaa", "{tmp}/out.mha"], 3, "a NIfTI file is named .nii or .nii.gz"),
        (["{store}", "part-00007", "{tmp}/pack"], 3, "no pack 'part-00007'; there are part-00000 to part-00000"),
        (["{store}", "part-00000", "{tmp}"], 2, "exists; give a folder that does not"),
        (["{store}"], 2, "expected STORE VOLUME out.nii.gz"),
        (["{tmp}", "aaaa", "{tmp}/out.nii.gz"], 3, "store.json"),
        (["{tmp}", "{tmp}/out"], 2, "no config.yaml"),
    ],
)
def test_what_cannot_be_exported_is_said_and_leaves_nothing(words, code, text, store, tmp_path, capsys):
    assert main(["export", *(word.format(store=store, tmp=tmp_path) for word in words)]) == code
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_pack_is_an_error_and_leaves_no_half_folder(tmp_path, capsys):
    store = make_store(tmp_path / "data")
    pack = layout.pack_path(store, 0)
    pack.write_bytes(pack.read_bytes()[:-100])
    assert main(["export", str(store), "part-00000", str(tmp_path / "out")]) == 3
    assert "part-00000.zarr.zip" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
