"""What predict needs grows with a volume's own bytes, as `mimscale.predict.volume` says, and never with its logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

from small_segmentation import make_finetune_run, make_store

EDGE, PLANES, OUTPUTS = 192, (96, 352), 8
CROP = (32, 96, 96)
PROGRAM = """
import json, resource, sys
import nibabel, numpy as np
from predict_samples import Threshold
from mimscale.cli import main
from mimscale.evaluate import weights

edge, planes, outputs, run, out = *json.loads(sys.argv[1]), *sys.argv[2:]
real = weights.load_model
middles = tuple(number / outputs for number in range(outputs))
weights.load_model = lambda *words: (Threshold(middles), real(*words)[1])
peaks = []
for number in planes:
    path = f"{out}/{number}.nii"
    image = nibabel.Nifti1Image(np.zeros((edge, edge, 1), np.int16), np.eye(4))
    image.header.set_data_shape((edge, edge, number))
    with open(path, "wb") as file:  # piece by piece: the test itself must not need what it measures
        image.header.write_to(file)
        file.write(b"\\0" * 4)
        for z in range(number):
            file.write(np.full((edge, edge), z % 900, np.int16).tobytes())
    words = [f"out={out}/masks", "threads=1", "overlap=0", "batch=1"]
    assert main(["predict", run, path, *words]) == 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # KiB on Linux
print(json.dumps(peaks))
"""


def test_memory_grows_with_the_volume_and_not_with_its_logits(tmp_path):
    store = make_store(tmp_path / "data")
    run = make_finetune_run(
        tmp_path / "run",
        store,
        outputs=OUTPUTS,
        fields={"crop_voxels": CROP},
        class_names=[f"class{number}" for number in range(OUTPUTS)],
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}",
        "MALLOC_MMAP_THRESHOLD_": "4194304",  # what is freed is given back: the peak is that of what is used
    }
    words = [json.dumps([EDGE, PLANES, OUTPUTS]), str(run), str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    low, high = json.loads(ended.stdout.splitlines()[-1])
    voxels = (PLANES[1] - PLANES[0]) * EDGE**2
    documented = 2 * 2 * voxels  # 2 b V of int16; 3 m V of its classes is less
    logits = 4 * OUTPUTS * voxels
    assert high - low <= documented + 12 * 2**20, f"{(high - low) / voxels:.2f} bytes a voxel"
    assert documented + 12 * 2**20 < logits / 5, "the bound must tell the two apart"
    assert (tmp_path / "masks" / f"{PLANES[1]}.nii.gz").exists()
