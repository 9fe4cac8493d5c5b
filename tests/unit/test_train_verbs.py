"""What `--check` says of a recipe's stream before a job waits in a queue."""

import pytest

from mimscale.cli import main

RUN = ["pretrain", "demo/pretrain", "store=/none", "run_dir=/none/run"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["stream.filter=modalty == 'ct'"],
            "stream.filter=modalty == 'ct': no column 'modalty'; did you mean modality?",
        ),
        (['stream.filter="label" in overlay'], "in overlay: must be a list of values in brackets, or one of overlays"),
        (
            ["stream.weights={by: spacing_mm, values: {a: 1}}"],
            "stream.weights.by=spacing_mm: spacing_mm holds 3 numbers",
        ),
        (["stream.region_voxels=[16, 96, 96]"], "stream.region_voxels=(16, 96, 96): must hold a crop of crop_voxels="),
        (["stream.origins=labelled"], "stream.origins=labelled: only a run that segments reads labels; use occupied"),
        (["stream.pos_neg=[0, 1]"], "stream.pos_neg=(0.0, 1.0): must be two numbers, the first above 0"),
        (["stream.target_spacing_mm=[1, 0, 1]"], "stream.target_spacing_mm=(1.0, 0.0, 1.0): must be above 0"),
        (["stream.max_spacing_ratio=-1"], "stream.max_spacing_ratio=-1.0: must be above 0"),
        (["stream.origins=everywhere"], "stream.origins: "),
    ],
)
def test_a_stream_that_cannot_be_is_refused_by_check(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RUN, *words, "--check"]) == 2
    assert problem in capsys.readouterr().err.replace("\n", " ")


def test_a_stream_with_everything_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        'stream.filter=modality == "CT" and spacing_mm[0] <= 3 and tags["site"] in ("A", "B") and "label" in overlays',
        """stream.weights={by: 'tags["site"]', values: {A: 1, B: 0.5}}""",
        "stream.region_voxels=[128, 128, 128]",
        "stream.target_spacing_mm=[1.5, 1, 1]",
        "stream.origins=occupied",
    ]
    assert main([*RUN, *words, "--check"]) == 0
    assert 'modality == "CT"' in capsys.readouterr().out
