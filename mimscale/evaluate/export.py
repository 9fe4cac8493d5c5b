"""`mimscale export`: out of a store or a run, in formats that need no mimscale.

STORE VOLUME out.nii.gz [overlay=NAME]     a volume, or its labels, on the grid of the source file
STORE part-00042 out_dir                   a pack, unzipped: a Zarr v3 group that any Zarr reader opens
RUN_DIR out_dir [checkpoint=NAME]          weights.safetensors, contract.json and a model card
"""

import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimscale import durable
from mimscale.config import load_config, split_arguments, verb_parser
from mimscale.console import print_json, say
from mimscale.errors import CheckpointError, ConfigError, DataError
from mimscale.store import layout
from mimscale.store.files import open_stream

USAGE = "expected STORE VOLUME out.nii.gz, STORE part-00000 out_dir, or RUN_DIR out_dir"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the key=value words of `mimscale export` may say."""

    overlay: str | None = None  # a volume's overlay instead of the volume itself
    checkpoint: str = "newest"  # of a run: "newest" verified one, or a name such as step_00000100


def main(argv: list[str]) -> int:
    """The verb `export`."""
    parser = verb_parser("export", "A volume as NIfTI, a pack unzipped, or a run's weights.")
    parser.add_argument("--json", action="store_true", help="print the written paths as JSON")
    arguments = parser.parse_args(argv)
    words, overrides = split_arguments(arguments.words)
    config = load_config(ExportConfig, None, overrides)
    if len(words) == 2:
        written = export_weights(Path(words[0]), Path(words[1]), config.checkpoint)
    elif len(words) == 3 and words[1].startswith("part-"):
        written = export_pack(Path(words[0]), words[1], Path(words[2]))
    elif len(words) == 3:
        written = export_volume(Path(words[0]), words[1], Path(words[2]), config.overlay)
    else:
        raise ConfigError(f"{USAGE}, got {words}")
    for path in written:
        say(f"wrote {path}")
    if arguments.json:
        print_json({"written": [str(path) for path in written]})
    else:
        print("\n".join(map(str, written)))
    return 0


def export_volume(store: Path, volume_id: str, out: Path, overlay: str | None = None) -> list[Path]:
    """Write a volume (or its overlay) as NIfTI with the array order and the affine of its source file.

    What ingest cropped off is the volume's fill value; a volume that it resampled is resampled back, and said to be.
    Overlays are as their files were in any case.

    Raises:
        DataError: no store, no such volume or overlay, a damaged pack, or a file that cannot be written.
    """
    from mimscale.evaluate.volumes import read_source_labels, write_nifti
    from mimscale.ingest.geometry import to_source_grid
    from mimscale.ingest.placement import Placement
    from mimscale.store.manifest import load_manifest
    from mimscale.store.reader import ShardReader

    manifest = load_manifest(store)
    row = manifest.row(manifest.index_of(volume_id))
    reader = ShardReader(store, manifest)
    if overlay is not None:
        turned = read_source_labels(reader, row, overlay)[None]
    else:
        placement = Placement.of_row(row)
        turned = placement.image_to_source(reader.read_volume(row), row.fill_value)  # [C, Z, Y, X]
        if placement.resampled:
            say(
                f"volume {row.id}: was resampled to {' x '.join(f'{edge:g}' for edge in row.spacing_mm)} mm (z, y, x); "
                "its voxels are interpolated back to the source's grid and are no longer those of the scanner"
            )
        if placement.crop_box is not None:
            say(f"volume {row.id}: only a part of it is stored; outside stands its fill value {row.fill_value:g}")
    channels = [to_source_grid(channel, row) for channel in turned]  # each (x, y, z) of the source
    voxels = channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)
    write_nifti(out, voxels, row.source_affine, "free some space, or choose another folder")
    return [out]


def export_pack(store: Path, name: str, out: Path) -> list[Path]:
    """Unzip a pack into a new folder `out`, which then is a Zarr group.

    Raises:
        DataError: no store, no such pack, a damaged one, or a folder that cannot be written.
        ConfigError: `out` exists.
    """
    info = layout.read_info(store)
    number = name.removeprefix("part-").removesuffix(".zarr.zip")
    if not number.isdigit() or int(number) >= info.num_parts:
        raise DataError(f"{store}: no pack {name!r}; there are part-00000 to part-{info.num_parts - 1:05d}")
    pack = layout.pack_path(store, int(number))
    if out.exists():
        raise ConfigError(f"{out}: exists; give a folder that does not, so that nothing is overwritten")
    temporary = out.with_name(f"{durable.TEMPORARY_PREFIX}{out.name}")
    try:
        with durable.explained(DataError, out, "free some space, or choose another folder"):
            temporary.mkdir(parents=True)
            with open_stream(pack) as stream, zipfile.ZipFile(stream) as archive:
                archive.extractall(temporary)
            durable.rename_folder(temporary, out)
    except zipfile.BadZipFile as error:
        raise DataError(f"{pack}: {error}; see what is damaged with `mimscale inspect {store} --verify`") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [out]


def export_weights(run_dir: Path, out: Path, checkpoint: str = "newest") -> list[Path]:
    """Write weights.safetensors, contract.json and README.md (a model card) of a run's checkpoint into `out`.

    Raises:
        ConfigError: no run directory.
        CheckpointError: no usable checkpoint, or a folder that cannot be written.
    """
    from mimscale.evaluate.checkpoints import find_checkpoint
    from mimscale.train.run_dir import RunDir

    run = RunDir(run_dir)
    run.read_config_tree()
    tag = find_checkpoint(run, checkpoint)
    contract = json.loads((tag / "contract.json").read_text())
    scores_path = run.evaluation / "scores.json"
    scores = json.loads(scores_path.read_text()) if scores_path.exists() else None
    if scores is not None and scores["checkpoint"] != tag.name:
        scores = None  # of other weights
    with durable.explained(CheckpointError, out, "free some space, or choose another folder"):
        for name in ("weights.safetensors", "contract.json"):
            with (tag / name).open("rb") as source, durable.open_atomically(out / name) as target:
                shutil.copyfileobj(source, target)
        durable.write_text(out / "README.md", model_card(contract, scores))
    return [out / name for name in ("weights.safetensors", "contract.json", "README.md")]


def model_card(contract: dict[str, Any], scores: dict[str, Any] | None) -> str:
    """What somebody must know who gets nothing but these weights, as Markdown."""
    crop, patch = (" x ".join(map(str, contract[key])) for key in ("crop_voxels", "patch_voxels"))
    model, intensity = contract["model"], contract["intensity"]
    methods = {
        "mae": "masked autoencoder",
        "simmim": "encoder pretrained with SimMIM",
        "simclr": "encoder pretrained with SimCLR",
    }
    pretrained = methods[contract.get("method", "mae")]
    head = {"unetr": "UNETR for segmentation", "linear": "linear probe for segmentation"}[contract.get("head", "unetr")]
    what = pretrained if contract["kind"] == "pretrain" else head
    lines = [
        f"# 3D {what}",
        "",
        f"Trained with mimscale for {contract['step']} steps on modality `{contract['modality']}`.",
        "`weights.safetensors` holds fp32 tensors, `contract.json` what they expect of their input.",
        "",
        "| | |",
        "|---|---|",
        f"| encoder | ViT, dim {model['dim']}, depth {model['depth']}, heads {model['heads']} |",
        f"| input | {contract['channels']} channel(s), {crop} voxels (Z, Y, X), patch {patch} |",
        f"| axes | {contract['axis_order']} |",
        f"| intensity | {', '.join(f'{key}: {value}' for key, value in intensity.items() if value is not None)} |",
    ]
    for entry in contract.get("datasets", []):
        lines.append(f"| trained on | {entry['volumes']} volumes of {entry['dataset']}, licence: {entry['licence']} |")
    if contract.get("class_names"):
        lines.append(f"| classes | {', '.join(contract['class_names'])} |")
    lines += ["", "## Scores", ""]
    if scores is None:
        lines.append("These weights have not been evaluated.")
    elif scores["kind"] == "pretrain":
        mean = scores["mean"]
        lines.append(
            f"{scores['error']} of hidden voxels on {len(scores['crops'])} {scores['split']} crops: "
            f"{mean['network']:.4f}; {scores['baseline']}: {mean['baseline']:.4f}."
        )
    else:
        lines += [f"On {len(scores['cases'])} whole {scores['split']} volumes:", "", "| class | Dice |", "|---|---|"]
        for name, entry in scores["per_class"].items():
            value = entry["dice"]["mean"]
            lines.append(f"| {name} | {'not defined' if value is None else f'{value:.4f}'} |")
    lines += [
        "",
        "## Use",
        "",
        "```",
        "mimscale finetune finetune_unetr init_from=THIS_FOLDER store=STORE run_dir=DIR",
        "```",
        "",
        "Not a medical device. Scores hold for volumes like those of the store that they were measured on.",
        "",
    ]
    return "\n".join(lines)
