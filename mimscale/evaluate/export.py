"""`mimscale export`: out of a store or a run, in formats that need no mimscale.

STORE VOLUME out.nii.gz [overlay=NAME]     a volume, or its labels, on the grid of the source file
STORE part-00042 out_dir                   a pack, unzipped: a Zarr v3 group that any Zarr reader opens
RUN_DIR out_dir [checkpoint=NAME]          weights.safetensors, contract.json and a model card
RUN_DIR out_dir --to-monai                 the encoder of a run, for MONAI's ViT, UNETR and Swin UNETR
RUN_DIR out_dir --to-nnunet                a residual-encoder U-Net of a run, for nnU-Net's
--from-monai FILE out_dir heads=12 crop_voxels=[96,96,96] patch_voxels=[16,16,16]
                                           a MONAI ViT's weights, for init_from of `mimscale finetune`
"""

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mimscale import durable
from mimscale.config import load_config, split_arguments, verb_parser
from mimscale.console import print_json, say
from mimscale.errors import ConfigError, DataError
from mimscale.store import layout
from mimscale.store.files import open_stream

USAGE = "expected STORE VOLUME out.nii.gz, STORE part-00000 out_dir, RUN_DIR out_dir, or --from-monai FILE out_dir"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the key=value words of `mimscale export` may say."""

    overlay: str | None = None  # a volume's overlay instead of the volume itself
    checkpoint: str = "newest"  # of a run: "newest" verified one, or a name such as step_00000100
    axes: Literal["xyz", "zyx"] = "xyz"  # order of a volume's axes where MONAI's weights are used or come from
    heads: int | None = None  # --from-monai: attention heads of the ViT
    crop_voxels: tuple[int, int, int] | None = None  # --from-monai: [Z, Y, X] that the ViT was built for
    patch_voxels: tuple[int, int, int] | None = None  # --from-monai: [Z, Y, X]
    prefix: str | None = None  # --from-monai: of the ViT's names (model.encoder., vit.); null: found
    ignored: tuple[str, ...] = ()  # --from-monai: beginnings of names, after the prefix, that may be left out
    modality: str | None = None  # --from-monai: what the ViT was trained on, for the model card


def main(argv: list[str]) -> int:
    """The verb `export`."""
    parser = verb_parser("export", "A volume as NIfTI, a pack unzipped, or a run's weights.")
    parser.add_argument("--json", action="store_true", help="print the written paths as JSON")
    parser.add_argument(
        "--to-monai", action="store_true", help="a run's encoder under the names of MONAI's ViT or Swin"
    )
    parser.add_argument("--to-nnunet", action="store_true", help="a run's U-Net under the names of nnU-Net's ResEnc")
    parser.add_argument("--from-monai", action="store_true", help="weights of a MONAI ViT under our names")
    arguments = parser.parse_args(argv)
    words, overrides = split_arguments(arguments.words)
    config = load_config(ExportConfig, None, overrides)
    names = [name for name in ("to_monai", "to_nnunet", "from_monai") if getattr(arguments, name)]
    if names and (len(words) != 2 or len(names) > 1):
        raise ConfigError(f"{USAGE}, got {words} and {', '.join(names)}")
    if len(words) == 2:
        written = _export_weights(config, Path(words[0]), Path(words[1]), *names)
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


def _export_weights(config: ExportConfig, given: Path, out: Path, names: str = "ours") -> list[Path]:
    from mimscale.evaluate.export_weights import export_to_monai, export_to_nnunet, export_weights, import_from_monai

    if names == "to_monai":
        return export_to_monai(given, out, config.checkpoint, axes=config.axes)
    if names == "to_nnunet":
        return export_to_nnunet(given, out, config.checkpoint)
    if names == "ours":
        return export_weights(given, out, config.checkpoint)
    if config.heads is None or config.crop_voxels is None or config.patch_voxels is None:
        raise ConfigError(
            "--from-monai: the file does not tell all of it; give heads=12 crop_voxels=[96,96,96] "
            "patch_voxels=[16,16,16] as the ViT was built, edges in the order Z, Y, X"
        )
    return import_from_monai(
        given,
        out,
        heads=config.heads,
        crop_voxels=config.crop_voxels,
        patch_voxels=config.patch_voxels,
        axes=config.axes,
        prefix=config.prefix,
        ignored=config.ignored,
        modality=config.modality,
    )


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
    layout.refuse_link_out(store, pack)
    if out.exists():
        raise ConfigError(f"{out}: exists; give a folder that does not, so that nothing is overwritten")
    temporary = out.with_name(f"{durable.TEMPORARY_PREFIX}{out.name}")
    try:
        with durable.explained(DataError, out, "free some space, or choose another folder"):
            temporary.mkdir(parents=True)
            with open_stream(pack) as stream, zipfile.ZipFile(stream) as archive:
                _refuse_strange_entries(pack, archive)
                archive.extractall(temporary)
            durable.rename_folder(temporary, out)
    except zipfile.BadZipFile as error:
        raise DataError(f"{pack}: {error}; see what is damaged with `mimscale inspect {store} --verify`") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [out]


def _refuse_strange_entries(pack: Path, archive: zipfile.ZipFile) -> None:
    """A pack's entries are plain files below it, not compressed: so none leads elsewhere or grows to a full disk."""
    for entry in archive.infolist():
        parts = entry.filename.split("/")
        if not all(parts) or {".", ".."} & set(parts) or "\\" in entry.filename:
            raise DataError(f"{pack}: its entry {entry.filename!r} leads elsewhere; mimscale wrote no such pack")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise DataError(f"{pack}: its entry {entry.filename!r} is compressed; mimscale wrote no such pack")
