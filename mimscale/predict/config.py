"""What `mimscale predict` may be told. Everything about the models comes from the runs' own configs and contracts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mimscale.evaluate.config import InferenceConfig


@dataclass(frozen=True, kw_only=True)
class PredictConfig(InferenceConfig):
    """Settings of one prediction."""

    out: Path = Path("predictions")  # folder of what is written, a file or a folder for each input
    # auto: DICOM-SEG for DICOM, else NIfTI. dicom-seg is for DICOM only: it refers to the instances that it was made of
    format: Literal["auto", "nifti", "dicom-seg", "both"] = "auto"
    existing: Literal["refuse", "skip", "overwrite"] = "refuse"  # what becomes of an output that is there already
    checkpoint: str = "newest"  # of each run: "newest" verified one, or a name such as step_00000100
    series: str | None = None  # of a folder with several DICOM series: a SeriesInstanceUID, or all
    modality: Literal["ct", "mr", "other"] | None = None  # of the inputs; null: as the runs' store, or the file, says
    assume_orientation: bool = False  # accept NIfTI files whose qform and sform codes are both 0
    channel_names: tuple[str, ...] = ()  # columns of a table or suffixes of BIDS that are the channels, in this order
    store: Path | None = None  # for weights whose contract does not say how volumes were stored: a store of theirs
    # DICOM-SEG: what a class or region is: {liver: [SCT, "10200004", Liver]}, scheme, code, meaning. Else its own name
    codes: dict[str, tuple[str, str, str]] = field(default_factory=dict)
