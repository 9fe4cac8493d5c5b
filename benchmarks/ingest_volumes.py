"""Volumes to ingest: real MR, and a CT that is made of noise and ellipses because no real one may be shipped."""

import gzip
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

COLIN27 = Path("/usr/share/mricron/templates/ch2.nii.gz")
GZIP_LEVEL = 6  # what most tools write


@dataclass(frozen=True)
class Kind:
    """One kind of volume, [X, Y, Z] as files hold it."""

    name: str
    modality: str
    voxels: np.ndarray
    affine: np.ndarray


def kinds() -> Iterator[Kind]:
    """All kinds that this machine has, the same voxels every time."""
    yield Kind("ct_synthetic_int16", "ct", synthetic_ct(), np.diag([-0.8, -0.8, 1.5, 1.0]))
    mni = _mni152()
    yield Kind("mni152_t1_uint8", "mr", mni.voxels, mni.affine)
    if COLIN27.exists():
        image = nibabel.load(COLIN27)
        yield Kind("colin27_t1_uint8", "mr", np.asanyarray(image.dataobj), image.affine)
    # A scanner's or a bias field correction's fractions: nothing to count, values must be sorted.
    fractions = np.random.default_rng(1).random(mni.voxels.shape, dtype=np.float32)
    yield Kind("mni152_t1_float32", "mr", mni.voxels * np.float32(1.37) + fractions, mni.affine)


def synthetic_ct(shape_xyz: tuple[int, int, int] = (320, 320, 160)) -> np.ndarray:
    """Air, soft tissue and lungs as ellipses, with the noise of a low dose: 20 HU. int16."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, edge, dtype=np.float32) for edge in shape_xyz), indexing="ij")
    hounsfield = np.full(shape_xyz, -1000, dtype=np.float32)
    hounsfield[(x / 0.9) ** 2 + (y / 0.7) ** 2 < 1] = 40
    hounsfield[((np.abs(x) - 0.45) / 0.3) ** 2 + (y / 0.45) ** 2 < 1 - 0.3 * z**2] = -850
    hounsfield[(x / 0.1) ** 2 + ((y - 0.45) / 0.1) ** 2 < 1] = 700
    noise = np.random.default_rng(0).normal(0, 20, shape_xyz)
    return np.clip(np.rint(hounsfield + noise), -1024, 3071).astype(np.int16)


def tiled_ct(edge_factor: int) -> np.ndarray:
    """The synthetic CT side by side, `edge_factor` times along two axes: 33 MB each."""
    return np.tile(synthetic_ct(), (edge_factor, edge_factor, 1))


def write_files(kind: Kind, folder: Path, count: int, suffix: str) -> list[str]:
    """`count` files of one kind that differ in their bytes: the volume shifted by some voxels."""
    paths = []
    for number in range(count):
        voxels = np.roll(kind.voxels, number, axis=2)
        path = folder / f"{kind.name}_{number}{suffix}"
        data = nibabel.Nifti1Image(voxels, kind.affine).to_bytes()
        path.write_bytes(gzip.compress(data, GZIP_LEVEL) if suffix.endswith(".gz") else data)
        paths.append(str(path))
    return paths


def _mni152() -> Kind:
    package = importlib.util.find_spec("nilearn")
    if package is None or package.origin is None:
        raise SystemExit("nilearn is not installed: pip install 'mimscale[demo]'")
    path = Path(package.origin).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    image = nibabel.load(path)
    return Kind("mni152", "mr", np.asanyarray(image.dataobj), image.affine)
