"""A Swin transformer and a Swin UNETR that go to MONAI give the same there, as the lines of their card build them."""

import dataclasses
import json

import pytest
import torch
from small_segmentation import make_pretrain_run, make_store

from mimscale.cli import main
from mimscale.config import config_tree
from mimscale.durable import sha256_of_file
from mimscale.errors import CheckpointError
from mimscale.evaluate.monai_loading import swin_loading
from mimscale.models.config import SwinConfig, TargetConfig, UnetrConfig
from mimscale.models.monai_swin_names import to_monai_swin
from mimscale.models.swin import SwinSimmim, SwinUnetr
from mimscale.models.transfer import save_weights

SWIN = SwinConfig(dim=12, depths=(2, 2, 1, 1), heads=(2, 2, 4, 4), window=(2, 3, 4), mlp_ratio=2.0)
CROP = (32, 32, 64)  # Z, Y, X; the last stage has fewer tokens along Y than the window


def pretrained(patch=(2, 2, 2), swin=SWIN):
    return SwinSimmim(swin, TargetConfig(), crop_voxels=CROP, patch_voxels=patch, channels=2)


def segmenter():
    return SwinUnetr(SWIN, UnetrConfig(num_classes=3), crop_voxels=CROP, patch_voxels=(2, 2, 2), channels=2)


def with_weights(model):
    torch.manual_seed(0)
    for parameter in model.parameters():  # biases and norms too, so that nothing is equal by being 0 or 1
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def contract_of(model):
    encoder = model.encoder
    shape = {"crop_voxels": list(CROP), "patch_voxels": list(encoder.patch_voxels), "channels": 2}
    return {"model": config_tree(encoder.config), **shape}


def theirs_of(model, axes, outputs, folder, monkeypatch):
    """MONAI's network, built and loaded (strictly) by the lines of the card."""
    contract = contract_of(model)
    save_weights(folder, to_monai_swin(model.state_dict(), contract, axes), contract)
    monkeypatch.chdir(folder)
    names = {}
    exec("\n".join(swin_loading(contract, axes, outputs)).split("```python\n")[1].split("```")[0], names)
    return names["swin" if outputs is None else "net"]


def turned(volume, axes):
    return volume if axes == "zyx" else volume.transpose(2, 4)


@torch.no_grad()
@pytest.mark.parametrize("axes", ["xyz", "zyx"])
def test_our_swin_gives_its_features_as_monais(axes, tmp_path, monkeypatch):
    ours = with_weights(pretrained((1, 2, 2)))
    theirs = theirs_of(ours, axes, None, tmp_path, monkeypatch)
    volume = torch.randn(1, 2, *CROP)
    for left, right in zip(ours.encoder(volume), theirs(turned(volume, axes)), strict=True):
        # fp32, six blocks whose sums run in another order.
        torch.testing.assert_close(turned(right, axes), left, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("axes", ["xyz", "zyx"])
def test_our_swin_unetr_gives_its_scores_as_monais(axes, tmp_path, monkeypatch):
    ours = with_weights(segmenter())
    theirs = theirs_of(ours, axes, 3, tmp_path, monkeypatch)
    volume = torch.randn(1, 2, *CROP)
    torch.testing.assert_close(turned(theirs(turned(volume, axes)), axes), ours(volume), rtol=1e-3, atol=1e-3)


def test_a_run_goes_to_monai_by_the_verb(tmp_path):
    model = pretrained()
    run = make_pretrain_run(tmp_path / "run", make_store(tmp_path / "store"))
    tag = next((run / "checkpoints").iterdir())
    contract = json.loads((tag / "contract.json").read_text()) | contract_of(model)
    (tag / "manifest.json").unlink()
    save_weights(tag, model.state_dict(), contract)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for path in tag.iterdir()}
    (tag / "manifest.json").write_text(json.dumps({"manifest_version": 1, "step": contract["step"], "files": files}))
    assert main(["export", str(run), str(tmp_path / "out"), "--to-monai"]) == 0
    assert json.loads((tmp_path / "out" / "contract.json").read_text())["layout"].endswith(".SwinTransformer")
    assert "SwinTransformer(2, 12, (4, 3, 2), (2, 2, 2)" in (tmp_path / "out" / "README.md").read_text()


def test_another_number_of_stages_than_monais_is_named():
    model = pretrained(swin=dataclasses.replace(SWIN, depths=(2, 2), heads=(2, 2)))
    with pytest.raises(CheckpointError, match=r"model\.depths=\[2, 2\]: MONAI's Swin transformer has 4 stages"):
        to_monai_swin(model.state_dict(), contract_of(model))


def test_a_decoder_that_monai_does_not_have_stays_here():
    model, contract = segmenter(), contract_of(segmenter())
    contract["patch_voxels"] = [1, 2, 2]
    theirs = to_monai_swin(model.state_dict(), contract)
    assert not any(name.startswith(("encoder", "decoder", "out")) for name in theirs)
    assert all(name.startswith(("patch_embed.", "layers")) for name in theirs)
