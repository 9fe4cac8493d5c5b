"""Command lines of runs that take seconds, on the stores of `stream_stores`."""

from pathlib import Path

from mimscale.train.run_dir import RunDir

SHAPES = [(40, 36, 44)] * 8


def pretrain_words(store: Path, run_dir: Path, *more: str) -> list[str]:
    """`mimscale pretrain ...` for 20 steps: anisotropic patches, non-cubic crops, accumulation 2 on two ranks."""
    return [
        "pretrain",
        "demo/pretrain",
        f"store={store}",
        f"run_dir={run_dir}",
        "steps=20",
        "global_batch=8",
        "micro_batch=2",
        "crop_voxels=[16, 24, 32]",
        "patch_voxels=[4, 8, 8]",
        "model={dim: 24, depth: 2, heads: 2, drop_path: 0.2}",
        "mae={decoder_dim: 24, decoder_depth: 1, decoder_heads: 2}",
        "stream={workers: 1, crops_per_volume: 2}",
        "checkpoint={every_steps: 100, keep: 2}",
        "meter={record_samples: true, tensorboard: false}",
        "validation={every_steps: 10}",
        "engine.bucket_elements=2000",  # so that a step's gradients travel in several buckets
        *more,
    ]


def run_of(words: list[str]) -> RunDir:
    """The run directory that a command line names."""
    return RunDir(Path(next(word.removeprefix("run_dir=") for word in words if word.startswith("run_dir="))))
