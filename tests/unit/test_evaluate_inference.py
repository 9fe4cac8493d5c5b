import pytest
import torch
from torch import nn

from mimscale.evaluate.inference import classes_of, predict_logits, window_batches

CPU = torch.device("cpu")


class Threshold(nn.Module):
    """Class 2 above 0.5, class 1 above 0, else 0; remembers how often and with how much it was called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, windows):
        self.calls.append(windows.shape)
        value = windows[:, 0]
        return torch.stack([-value, 0.4 * value, 1.5 * value - 0.55], dim=1)


def expected_classes(image):
    value = image[0]
    return torch.stack([-value, 0.4 * value, 1.5 * value - 0.55]).argmax(0)


@pytest.mark.parametrize("size", [(12, 20, 16), (8, 8, 8), (9, 8, 23)])
def test_windows_put_together_give_what_the_network_says_of_each_voxel(size):
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    classes = classes_of(predict_logits(Threshold(), image, (8, 8, 8), overlap=0.5, batch=3, device=CPU))
    assert classes.dtype == torch.uint8
    assert torch.equal(classes.long(), expected_classes(image))


def test_an_image_smaller_than_a_window_is_refused_since_its_surroundings_are_the_readers_affair():
    with pytest.raises(ValueError, match=r"\(5, 9, 8\) voxels is smaller than a window of \(8, 8, 8\)"):
        predict_logits(Threshold(), torch.zeros(1, 5, 9, 8), (8, 8, 8), overlap=0.5, batch=1, device=CPU)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("size", [(12, 20, 16), (8, 9, 30)])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_progress_bar_counts_to_the_forward_passes_that_are_made(overlap, size, batch):
    model, ticks = Threshold(), []
    predict_logits(
        model,
        torch.zeros(1, *size),
        (8, 8, 6),
        overlap=overlap,
        batch=batch,
        device=CPU,
        after_batch=lambda: ticks.append(1),
    )
    assert len(ticks) == len(model.calls) == window_batches(size, (8, 8, 6), overlap, batch)


def test_no_more_windows_than_asked_for_are_computed_at_once():
    model = Threshold()
    predict_logits(model, torch.zeros(1, 16, 16, 16), (8, 8, 8), overlap=0.5, batch=4, device=CPU)
    assert max(shape[0] for shape in model.calls) == 4


def test_a_network_that_answers_with_nan_is_an_error_and_no_prediction():
    class Broken(nn.Module):
        def forward(self, windows):
            logits = torch.zeros(windows.shape[0], 2, *windows.shape[2:])
            logits[:, 1, 0, 0, 0] = float("nan")
            return logits

    with pytest.raises(FloatingPointError, match="not finite"):
        predict_logits(Broken(), torch.zeros(1, 8, 8, 8), (8, 8, 8), overlap=0.5, batch=1, device=CPU)
