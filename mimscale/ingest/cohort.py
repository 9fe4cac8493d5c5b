"""`mimscale cohort`: one real labelled volume -> a small cohort, for demos and tests where no data set is at hand.

Derived subjects show that a pipeline works. They are one anatomy, bent: scores on them say nothing about patients.
"""

import gzip
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from mimscale import console, durable
from mimscale.config import config_yaml, load_verb_config, verb_parser
from mimscale.errors import DataError
from mimscale.ingest import formats, geometry
from mimscale.ingest.config import CohortConfig
from mimscale.ingest.derive import derive
from mimscale.ingest.placement import place
from mimscale.ingest.pool import process_pool

MNI152_CLASSES = ("background", "grey matter", "white matter")
_MNI152_NAME = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_WAY_OUT = "free some space or choose another out"


@dataclass(frozen=True)
class RealSubject:
    """The volume that all others are derived from, in its file's axis order."""

    image: NDArray[Any]  # [X, Y, Z]
    label: NDArray[np.uint8]  # [X, Y, Z]
    affine: NDArray[np.float64]  # voxel (x, y, z, 1) -> world, mm
    class_names: tuple[str, ...]
    origin: str  # what it is, for the report


def main(argv: list[str]) -> int:
    """`mimscale cohort out=DIR [subjects=N seed=S image=FILE label=FILE ...] [--check] [--json]`."""
    parser = verb_parser("cohort", "Write a small cohort of deformed, contrast-varied subjects of one real volume.")
    parser.add_argument("--check", action="store_true", help="print the resolved config and leave")
    parser.add_argument("--json", action="store_true", help="the files written, as JSON on stdout")
    arguments = parser.parse_intermixed_args(argv)  # words may follow a flag
    config = load_verb_config(CohortConfig, arguments.words, needs_recipe=False)
    if arguments.check:
        print(config_yaml(config), end="")
        return 0
    start = time.monotonic()
    files = write_cohort(config)
    if arguments.json:
        console.print_json({"files": files, "seconds": round(time.monotonic() - start, 3)})
    console.say(
        f"{config.out}: 1 real and {config.subjects} derived subjects in {time.monotonic() - start:.1f} s; "
        f"next: mimscale ingest demo/ingest sources={config.out}/dataset.json out=STORE"
    )
    return 0


def write_cohort(config: CohortConfig) -> list[str]:
    """Write the cohort; `dataset.json` and `cohort.json` come last. Returns the paths.

    Raises:
        DataError: the real volume cannot be used, or the folder cannot be written.
    """
    out = Path(config.out)
    real = _mni152() if config.image is None else _users_own(config)
    if config.spacing_mm is not None:
        real = _resampled(real, config.spacing_mm)
    _write_pair(out, "real_000", real.image, real.label, real.affine)
    names = {"real_000": {"kind": "real", "origin": real.origin, "spacing_mm": config.spacing_mm}}
    with process_pool(config.workers, config.subjects) as pool:
        numbers = range(1, config.subjects + 1)
        jobs = [(str(out), real, config.seed, number) for number in numbers]
        results = map(_write_derived, jobs) if pool is None else pool.map(_write_derived, jobs)
        for name, parameters in console.track(results, "derive subjects", config.subjects):
            names[name] = {"kind": "derived", "from": "real_000", **parameters}
    with durable.explained(DataError, out, _WAY_OUT):
        durable.write_json(out / "dataset.json", _decathlon(real, list(names), config.validation))
        durable.write_json(out / "cohort.json", {"seed": config.seed, "subjects": names})
    pairs = [str(out / folder / f"{name}.nii.gz") for name in names for folder in ("imagesTr", "labelsTr")]
    return [*pairs, str(out / "dataset.json"), str(out / "cohort.json")]


def _decathlon(real: RealSubject, names: list[str], validation: int | None) -> dict[str, Any]:
    """The list of a cohort; `names` begins with the real subject."""
    pairs = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names]
    training, fixed = pairs, {}
    if validation is not None:
        last = len(pairs) - validation
        training, fixed = pairs[1:last], {"validation": [pairs[0], *pairs[last:]]}
    return {
        "name": "cohort",
        "description": f"real_000 is {real.origin}; all others are derived from it by mimscale cohort",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(value): name for value, name in enumerate(real.class_names)},
        "numTraining": len(training),
        "numTest": 0,
        "training": training,
        **fixed,
        "test": [],
    }


def _write_derived(job: tuple[str, RealSubject, int, int]) -> tuple[str, dict[str, Any]]:
    out, real, seed, number = job
    spacing_xyz_mm = np.linalg.norm(real.affine[:3, :3], axis=0)
    subject = derive(real.image, real.label, spacing_xyz_mm, seed, number)
    name = f"derived_{number:03d}"
    _write_pair(Path(out), name, subject.image, subject.label, real.affine)
    return name, subject.parameters


def _write_pair(
    out: Path, name: str, image: NDArray[Any], label: NDArray[np.uint8], affine: NDArray[np.float64]
) -> None:
    for folder, voxels in (("imagesTr", image), ("labelsTr", label)):
        nifti: Any = nibabel.Nifti1Image(voxels, affine)  # type: ignore[no-untyped-call]
        nifti.header.set_xyzt_units("mm")
        path = out / folder / f"{name}.nii.gz"
        with durable.explained(DataError, path, _WAY_OUT):
            # mtime=0: the same subject is the same file. Level 1: noise hardly compresses, and higher ones are slow.
            durable.write_bytes(path, gzip.compress(nifti.to_bytes(), compresslevel=1, mtime=0))


def _mni152() -> RealSubject:
    """MNI152 2009a T1 with labels by the largest of background, grey and white matter share."""
    package = importlib.util.find_spec("nilearn")
    if package is None or not package.submodule_search_locations:
        raise DataError(
            "nilearn, which ships the MNI152 volume, is not installed; run pip install 'mimscale[demo]', or give "
            "your own with image=FILE label=FILE"
        )
    folder = Path(package.submodule_search_locations[0]) / "datasets" / "data"
    t1, grey, white = (_scan(folder / _MNI152_NAME.format(kind)) for kind in ("t1", "gm", "wm"))
    background = 255 - grey.voxels[0].astype(np.int16) - white.voxels[0]
    label = np.argmax(np.stack([background, grey.voxels[0], white.voxels[0]]), axis=0).astype(np.uint8)
    origin = "MNI152 2009a nonlinear symmetric T1 (an average of 152 people), 1 mm, as nilearn ships it"
    return RealSubject(t1.voxels[0], label, t1.affine, MNI152_CLASSES, origin)


def _users_own(config: CohortConfig) -> RealSubject:
    assert config.image is not None, "the config has both or neither"
    assert config.label is not None, "the config has both or neither"
    image, label = _scan(Path(config.image)), _scan(Path(config.label))
    x, y, z = image.voxels.shape[1:]
    if label.voxels.shape[1:] != (x, y, z):
        raise DataError(
            f"{config.label}: {label.voxels.shape[1:]} voxels, {config.image} has {(x, y, z)}; give a label on its grid"
        )
    distance = geometry.grid_distance_voxels(image.affine, label.affine, (x, y, z))
    if distance > 0.1:
        raise DataError(
            f"{config.label}: lies {distance:.3g} voxels away from {config.image}; give a label on the same grid"
        )
    low, high = float(label.voxels.min()), float(label.voxels.max())
    if label.voxels.dtype.kind == "f" or low < 0 or high > 254:
        raise DataError(f"{config.label}: values from {low:g} to {high:g}; a label holds whole numbers from 0 to 254")
    names = config.class_names or ("background", *(f"class_{value}" for value in range(1, int(high) + 1)))
    if len(names) <= high:
        raise DataError(f"{config.label}: holds label {high:g}, class_names has {len(names)} names; name every value")
    return RealSubject(image.voxels[0], label.voxels[0].astype(np.uint8), image.affine, names, Path(config.image).name)


def _scan(path: Path) -> formats.Scan:
    with durable.explained(DataError, path, "give a volume file that exists"):
        files = [formats.SourceFile(one, one.read_bytes()) for one in (path, *formats.companions(path))]
    try:
        return formats.read_scan(files, formats.ReadOptions())
    except formats.QuarantineError as error:
        raise DataError(f"{path}: {formats.REASONS[error.reason]} ({error.detail}); give a whole 3D volume") from None


def _resampled(real: RealSubject, spacing_mm: float) -> RealSubject:
    """The real volume on cubic voxels."""
    image, affine = geometry.to_store_grid(real.image, real.affine)
    label, _ = geometry.to_store_grid(real.label, real.affine)
    z, y, x = image.shape
    try:
        placement = place(
            (z, y, x),
            geometry.spacing_zyx_mm(affine),
            voxel_bytes=image.itemsize,
            max_bytes=formats.ReadOptions().max_volume_bytes,
            wanted_mm=(spacing_mm,) * 3,
        )
    except formats.QuarantineError as error:
        raise DataError(f"spacing_mm={spacing_mm}: {error.detail}; choose another") from None
    return RealSubject(
        placement.store_image(image[None])[0].transpose(2, 1, 0),
        placement.store_classes(label).transpose(2, 1, 0),
        placement.affine(affine),
        real.class_names,
        f"{real.origin}, resampled to {spacing_mm} mm",
    )
