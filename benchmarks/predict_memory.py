"""What `mimscale predict` needs for a CT of 1 024 slices: peak memory and time, beside what its formula says.

    python benchmarks/predict_memory.py [--shape 1024 512 512] [--classes 14] [--folder /tmp/predict_memory]

The network is a linear probe on a small ViT with the recipe's windows: what is gathered of its answers does not depend
on how wide it is, and a UNETR on a ViT-B would take hours on a CPU. Weights are random.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import torch
from ingest_volumes import synthetic_ct
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from mimscale.config import config_tree, config_yaml
from mimscale.durable import sha256_of_file, write_json, write_text
from mimscale.models.config import UnetrConfig, VitConfig
from mimscale.models.transfer import save_weights
from mimscale.store.intensity import IntensityContract
from mimscale.train.build import build_segmenter
from mimscale.train.committed import tag_name
from mimscale.train.config import FinetuneConfig
from mimscale.train.environment import memory_peak_bytes

STEP_MM, TILE = 0.8, 128


def write_series(folder: Path, shape_zyx: tuple[int, int, int]) -> None:
    """A synthetic CT as one file a slice."""
    planes, rows, columns = shape_zyx
    tile = synthetic_ct((columns, rows, TILE))
    folder.mkdir(parents=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for number in range(planes):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = CTImageStorage
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.Modality, one.PatientID, one.InstanceNumber = "CT", "P1", number + 1
        one.ImagePositionPatient = [-200, -200, STEP_MM * number]
        one.ImageOrientationPatient, one.PixelSpacing, one.SliceThickness = [1, 0, 0, 0, 1, 0], [0.8, 0.8], STEP_MM
        one.Rows, one.Columns, one.SamplesPerPixel, one.PhotometricInterpretation = rows, columns, 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleSlope, one.RescaleIntercept = 1, 0
        one.PixelData = np.ascontiguousarray(tile[:, :, number % TILE].T).tobytes()
        pydicom.dcmwrite(folder / f"IM{number:05d}", one, enforce_file_format=True)


def write_run(folder: Path, classes: int, crop_voxels: tuple[int, int, int]) -> None:
    """A run of random weights, whose contract is that of a CT at its own spacing."""
    config = FinetuneConfig(
        store=folder / "no_store",
        run_dir=folder,
        steps=1,
        global_batch=1,
        micro_batch=1,
        crop_voxels=crop_voxels,
        patch_voxels=(16, 16, 16),
        model=VitConfig(dim=48, depth=3, heads=2),
        head="linear",
        unetr=UnetrConfig(num_classes=classes),
    )
    torch.manual_seed(0)
    write_text(folder / "config.yaml", config_yaml(config))
    tag = folder / "checkpoints" / tag_name(1)
    contract = {
        "channels": 1,
        "intensity": config_tree(IntensityContract(kind="window", window=(-1000.0, 1000.0))),
        "modality": "ct",
        "class_names": ["background", *(f"organ_{number}" for number in range(1, classes))],
        "stored_as": {},
        "step": 1,
    }
    save_weights(tag, build_segmenter(config, 1).state_dict(), contract)
    files = {one.name: {"bytes": one.stat().st_size, "sha256": sha256_of_file(one)} for one in tag.iterdir()}
    write_json(tag / "manifest.json", {"manifest_version": 2, "step": 1, "files": files})


def main() -> None:
    """Make what is missing, predict in a fresh process, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs=3, type=int, default=[1024, 512, 512], metavar=("Z", "Y", "X"))
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--crop", nargs=3, type=int, default=[96, 96, 96], metavar=("Z", "Y", "X"))
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/predict_memory"))
    parser.add_argument("--measured", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measured:
        from mimscale.cli import main as verb

        assert verb(arguments.measured) == 0
        print(json.dumps({"peak_bytes": memory_peak_bytes()}))
        return
    z, y, x = arguments.shape
    series, run = arguments.folder / f"ct_{z}_{y}_{x}", arguments.folder / f"run_{arguments.classes}"
    if not series.exists():
        write_series(series, (z, y, x))
    write_run(run, arguments.classes, tuple(arguments.crop))
    words = ["predict", str(run), str(series), f"out={arguments.folder / 'out'}", "format=both", "existing=overwrite"]
    words += [f"overlap={arguments.overlap}"]
    started_s = time.perf_counter()
    program = [sys.executable, __file__, "--measured", *words]
    ended = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ})
    seconds = time.perf_counter() - started_s
    peak = json.loads(ended.stdout.splitlines()[-1])["peak_bytes"]
    voxels, plane = z * y * x, y * x
    slab = (arguments.classes + 2) * 4 * arguments.crop[0] * plane
    rows = {
        "peak": peak,
        "formula: read, 2 b V": 2 * 2 * voxels,
        "formula: segment, b V + m V + slab": 3 * voxels + slab,
        "of the slab": slab,
        "whole logits and image would be": (arguments.classes + 2) * 4 * voxels,
    }
    print(f"{z} x {y} x {x} voxels, {arguments.classes} classes, overlap {arguments.overlap:g}: {seconds:.0f} s")
    for name, value in rows.items():
        print(f"  {name}: {value / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
