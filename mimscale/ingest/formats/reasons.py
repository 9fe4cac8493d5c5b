"""Why a source cannot be stored: the words that receipts hold and scripts count."""

# One word each. Those of files come first, then of voxels, geometry, DICOM series, and labels.
REASONS = {
    "missing_file": "no such file",
    "empty_file": "0 bytes",
    "truncated": "ends early",
    "unreadable": "not a file of its format",
    "too_large": "claims more voxels than a volume may have",
    "outside_source": "names a file outside its own folder",
    "missing_channel": "one of its channels has no file",
    "label_without_image": "a label map that belongs to no image",
    "several_series": "a folder that a list names as one volume, and that holds several",
    "unsupported_encoding": "its voxels are encoded in a way that is not read",
    "not_3d": "has not the axes that were asked for",
    "not_finite": "holds NaN or infinity",
    "unsupported_dtype": "holds no plain numbers",
    "colour": "holds colours, not intensities",
    "bad_rescale": "has no usable rescale slope and intercept",
    "bad_affine": "has no usable voxel -> world matrix",
    "no_orientation": "does not say where its axes point",
    "no_spacing": "does not say how large its voxels are",
    "not_dicom": "is neither DICOM nor named like another format",
    "not_an_image": "a DICOM object without scanned voxels (report, plan, segmentation, dose ...)",
    "missing_pixels": "a DICOM image without pixel data",
    "localizer": "planning images, not a volume",
    "too_few_slices": "a DICOM series of fewer slices than make a volume",
    "copied_files": "copies of DICOM files of the same series",
    "time_series": "a DICOM series with several slices at every position (4-D)",
    "duplicate_positions": "a DICOM series with several slices at some positions",
    "missing_slices": "a DICOM series with gaps of whole slices",
    "uneven_slices": "a DICOM series whose slices are not evenly spaced",
    "gantry_tilt": "a DICOM series sheared by a tilted gantry",
    "shifted_slices": "a DICOM series whose slices do not lie behind each other",
    "mixed_orientations": "a DICOM series whose slices are not parallel",
    "mixed_grids": "a DICOM series whose slices differ in pixels or pixel spacing",
    "channel_grid_mismatch": "its channels lie on different grids",
    "label_grid_mismatch": "label lies on another grid than its image",
    "conflicting_labels": "image is stored already, with another label map",
    "too_coarse": "is shorter than half a voxel of spacing_mm",
    "unexpected_labels": "label holds values that class_names does not name",
}


class QuarantineError(Exception):
    """A source that cannot be stored; it never stops an ingest.

    `detail` is kept inside the store: it names no file, and quotes no text that a header holds.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
