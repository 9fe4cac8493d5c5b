"""Weights out of a run and into one: what is shared, what MONAI takes, and what files from elsewhere may hold."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from monai.networks.nets.vit import ViT
from small_segmentation import make_pretrain_run, make_store

from mimscale.cli import main
from mimscale.errors import CheckpointError
from mimscale.models.config import UnetrConfig, VitConfig
from mimscale.models.transfer import load_encoder, load_weights
from mimscale.models.unetr import Unetr

CROP, PATCH = (16, 16, 32), (8, 8, 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    run = make_pretrain_run(
        folder / "run",
        make_store(folder / "store"),
        datasets=[{"dataset": "A|B <b>\n`x`", "licence": "CC-BY", "volumes": 3}],
        spacing_mm=[2.0, 1.0, 1.0],
    )
    (run / "env.json").write_text(json.dumps({"commit": "abc123", "packages": {"torch": "2.13.0", "deepspeed": None}}))
    return run


def words_of(file, out, *more):
    sizes = ["heads=2", "crop_voxels=[16,16,32]", "patch_voxels=[8,8,16]"]
    return ["export", "--from-monai", str(file), str(out), *sizes, *more]


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return ViT(1, CROP[::-1], PATCH[::-1], 24, 96, 2, 2)


def test_what_is_shared_says_how_the_weights_were_made_and_nothing_about_where(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    contract = json.loads((tmp_path / "out" / "contract.json").read_text())
    assert contract["git_commit"] == "abc123"
    assert contract["recipe"]["optim"]["betas"] == [0.9, 0.95]
    assert contract["recipe"]["global_batch"] == 2
    assert contract["recipe"].keys().isdisjoint({"store", "run_dir", "init_from"})
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("Intended use", "How to load", "Not a medical device", "10 crops", "2.0 x 1.0 x 1.0", "torch 2.13.0"):
        assert part in card, part
    assert "| data 1 | 3 volumes of A\\|B &lt;b> 'x', licence: CC-BY |" in card
    for path in (tmp_path / "out").iterdir():
        assert str(run.parent).encode() not in path.read_bytes(), f"{path.name} says where the run lay"


def test_the_lines_of_the_card_load_the_weights_without_this_package(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0]
    program = lines + "\nimport sys\nprint(len(tensors), [m for m in ('mimscale', 'deepspeed') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "out", capture_output=True, text=True, timeout=60
    )
    tensors, _ = load_weights(tmp_path / "out")
    assert done.stdout == f"{len(tensors)} []\n", done.stderr


def test_exporting_weights_imports_no_torch(run, tmp_path):
    program = "import sys; from mimscale.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    words = ["export", str(run), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_run_goes_to_monai_as_its_card_says(run, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--to-monai"]) == 0
    lines = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    program = lines + "\nimport torch\nprint(list(vit(torch.zeros(1, 1, 16, 16, 16))[0].shape))"
    done = subprocess.run([sys.executable, "-c", program], cwd=out, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[1, 8, 24]\n", done.stderr
    assert json.loads((out / "contract.json").read_text())["axis_order"] == "CXYZ, RAS+"


def test_weights_in_monais_layout_are_no_source_of_a_transfer(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out"), "--to-monai"]) == 0
    with pytest.raises(CheckpointError, match=r"laid out for monai.*export --from-monai"):
        load_weights(tmp_path / "out")


@pytest.mark.parametrize("kind", ["safetensors", "torch", "lightning"])
def test_a_vit_of_monai_becomes_what_init_from_takes(kind, theirs, tmp_path, capsys):
    state = theirs.state_dict()
    file = tmp_path / ("vit.safetensors" if kind == "safetensors" else "vit.pt")
    if kind == "safetensors":
        safetensors.torch.save_file(state, file)
    elif kind == "torch":
        torch.save(state, file)
    else:
        nested = {f"model.encoder.{name}": value for name, value in state.items()}
        torch.save({"epoch": 3, "state_dict": {**nested, "model.mask_token": torch.zeros(4)}}, file)
    assert main(words_of(file, tmp_path / "out", "modality=ct")) == 0
    assert ("are left out (model" in capsys.readouterr().err) == (kind == "lightning")
    tensors, contract = load_weights(tmp_path / "out")
    assert contract["kind"] == "imported"
    assert "sha256" in contract["imported_from"]
    vit = VitConfig(dim=24, depth=2, heads=2, positions="learned")
    head = UnetrConfig(feature_size=4, num_classes=2)
    model = Unetr(vit, head, crop_voxels=CROP, patch_voxels=PATCH, channels=1)
    assert load_encoder(model, tensors, contract).is_complete
    volume = torch.randn(1, 1, *CROP)
    with torch.no_grad():
        expected = theirs.eval()(volume.permute(0, 1, 4, 3, 2))[0]
        tokens = model.encoder(volume)[0]
    turned = expected.reshape(1, 2, 2, 2, 24).permute(0, 3, 2, 1, 4).flatten(1, 3)
    assert torch.allclose(tokens, turned, atol=1e-5)  # fp32, two blocks
    assert "imported from" in (tmp_path / "out" / "README.md").read_text()


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "more", "text"),
    [
        (lambda state: without(state, "norm.weight"), [], "missing norm.weight"),
        (lambda state: without(state, "blocks.1.attn.qkv.weight"), [], "missing blocks.1.attn.qkv.weight"),
        (lambda state: state | {"head.weight": torch.zeros(2)}, [], "unknown head.weight"),
        (lambda state: state | {"cls_token": torch.zeros(1, 1, 24)}, [], "has a class token"),
        (
            lambda state: state | {f"teacher.{name}": value.clone() for name, value in state.items()},
            [],
            "give one of prefix='', 'teacher.'",
        ),
        (lambda state: {"conv.weight": torch.zeros(3)}, [], "no MONAI ViT: no tensor is called"),
        (lambda state: state | {"norm.bias": torch.full((24,), float("nan"))}, [], "norm.bias: not finite"),
        (lambda state: state | {"norm.bias": torch.zeros(7)}, [], "norm.bias: [7], expected [24]"),
        (lambda state: state | {"norm.bias": torch.tensor(1.0)}, [], "norm.bias: a single number"),
        (
            lambda state: state | {"blocks.0.mlp.linear2.weight": torch.zeros(24, 95)},
            [],
            "blocks.0.mlp.fall: [24, 95]",
        ),
        (dict, ["heads=5"], "heads=5: model.dim=24 must be a multiple of model.heads=5"),
        (dict, ["patch_voxels=[8,8,8]"], "make 16 patches (2 x 2 x 4)"),
        (dict, ["patch_voxels=[16,8,8]"], "expected [24, channels, 8, 8, 16]"),
        (dict, ["crop_voxels=[16,16,30]"], "does not divide into patches"),
        (dict, ["prefix=vit."], "prefix=vit.: no ViT there; give one of prefix=''"),
    ],
)
def test_a_file_that_is_no_such_vit_is_refused_by_name(change, more, text, theirs, tmp_path, capsys):
    file = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(change({name: value.clone() for name, value in theirs.state_dict().items()}), file)
    assert main(words_of(file, tmp_path / "out", *more)) == CheckpointError.exit_code
    said = capsys.readouterr().err
    assert text in said
    assert str(file) in said
    assert not (tmp_path / "out").exists()


def test_further_tensors_can_be_left_out_by_name(theirs, tmp_path):
    file = tmp_path / "vit.safetensors"
    safetensors.torch.save_file({**theirs.state_dict(), "head.weight": torch.zeros(2)}, file)
    assert main(words_of(file, tmp_path / "out", "ignored=[head.]")) == 0


class Payload:
    """Whoever unpickles it makes a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["torch", "pickle", "safetensors", "text", "empty", "list", "numbers"])
def test_a_hostile_or_strange_file_is_refused_and_nothing_in_it_is_executed(kind, tmp_path, capsys):
    mark, file = tmp_path / "executed", tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pt")
    payload = Payload(mark)
    if kind in ("torch", "list", "numbers"):
        tree = {"torch": {"state_dict": {"a": payload}}, "list": [torch.zeros(2)], "numbers": {"epoch": 3}}[kind]
        torch.save(tree, file)
    else:
        data = {"pickle": pickle.dumps(payload), "safetensors": pickle.dumps(payload), "text": b"hello", "empty": b""}
        file.write_bytes(data[kind])
    assert main(words_of(file, tmp_path / "out")) == CheckpointError.exit_code
    assert str(file) in capsys.readouterr().err
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--from-monai", "{tmp}/none.pt", "{tmp}/out", "heads=2"], 2, "the file does not tell all of it"),
        (["--from-monai", "{tmp}/none.pt"], 2, "--from-monai FILE out_dir"),
        (["--from-monai", "--to-monai", "a", "b"], 2, "--from-monai FILE out_dir"),
        (["{tmp}", "{tmp}/out", "--to-monai"], 2, "no config.yaml"),
    ],
)
def test_a_command_line_that_lacks_something_is_refused(words, code, text, tmp_path, capsys):
    assert main(["export", *(word.format(tmp=tmp_path) for word in words)]) == code
    assert text in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert main(words_of(tmp_path / "none.pt", tmp_path / "out")) == CheckpointError.exit_code
    assert "none.pt: no such file" in capsys.readouterr().err


def test_rotary_positions_have_no_place_in_monai(run, tmp_path, capsys):
    contract = next((run / "checkpoints").iterdir()) / "contract.json"
    tree = json.loads(contract.read_text())
    rotary = make_pretrain_run(tmp_path / "run", tmp_path, model=tree["model"] | {"positions": "rope"})
    assert main(["export", str(rotary), str(tmp_path / "out"), "--to-monai"]) == CheckpointError.exit_code
    assert "MONAI's ViT has no rotary positions" in capsys.readouterr().err
