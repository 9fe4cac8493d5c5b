"""The largest run that the plan must serve, simulated: one process of 4 096 ranks x 8 workers on 400 000 volumes."""

import json
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import json, os, sys, time
    import numpy as np
    import numpy.ma  # np.unique imports it when it is called
    from mimscale.stream.config import StreamConfig, WeightsConfig
    from mimscale.stream.crops import Volumes
    from mimscale.stream.plan import SamplePlan

    VOLUMES, RANKS, WORKERS, MICRO_BATCH = 400_000, 4096, 8, 8
    def resident_bytes():
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, opened = resident_bytes(), []
    shapes = (100 + np.arange(VOLUMES * 3, dtype=np.int32).reshape(VOLUMES, 3) % 400)
    boxes = np.stack([shapes // 4, shapes * 3 // 4], axis=-1)
    kinds = np.array(["ct", "mr", "pt", "ct"])[np.arange(VOLUMES) % 4] if sys.argv[1] == "weights" else None
    sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)
    began = time.perf_counter()
    config = StreamConfig(
        crops_per_volume=8,
        origins="foreground",
        region_voxels=(128, 128, 128) if sys.argv[1] == "regions" else None,
        weights=None if kinds is None else WeightsConfig(by="modality", values={"ct": 0.3, "pt": 0.7}),
    )
    plan = SamplePlan(seed=1, volumes=Volumes(shapes=shapes, foreground_boxes=boxes, kinds=kinds),
                      crop_voxels=(96, 96, 96), config=config, global_batch=RANKS * MICRO_BATCH)
    got = 0
    for worker in range(WORKERS):
        got += len(plan.samples(plan.rank_samples(worker, RANKS - 1, RANKS)[0]).origin)
    took_s = time.perf_counter() - began
    files = list(opened)
    plan.plan_hash
    print(json.dumps({"took_s": took_s, "files": files, "grown_mib": (resident_bytes() - before) / 2**20, "got": got}))
"""


@pytest.mark.parametrize("mode", ["plain", "regions", "weights"])
def test_a_rank_of_4096_has_its_first_batches_at_once_in_little_memory_without_a_file(mode: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), mode], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    print(mode, found)
    assert found["files"] == []
    assert found["got"] == 8 * 8
    assert found["grown_mib"] < 100
    assert found["took_s"] < 3  # half a second on an idle machine; a busy one must fail nobody
