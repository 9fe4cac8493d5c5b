import itertools

import pytest
import torch
from monai.inferers.utils import sliding_window_inference
from small_segmentation import InMemory
from torch import nn

from mimscale.evaluate.inference import classes_of, predict_planes, window_batches

CPU = torch.device("cpu")


def predict_logits(model, image, crop_voxels, **words):
    return torch.cat(list(predict_planes(model, InMemory(image), crop_voxels, **words)), dim=1)


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


class Lopsided(nn.Module):
    """Answers with something else when the window is mirrored: each voxel sees its neighbours to one side."""

    def forward(self, windows):
        value = windows[:, 0]
        seen = value + 2 * value.roll(1, 1) + 3 * value.roll(1, 2) + 5 * value.roll(1, 3)
        return torch.stack([seen, -seen], dim=1)


@pytest.mark.parametrize("flips", [(), (2,), (0, 2), (0, 1, 2)])
def test_flips_give_the_mean_over_every_combination_of_mirror_images(flips):
    image = torch.randn(1, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    ticks = []
    logits = predict_logits(
        Lopsided(), image, (6, 5, 4), overlap=0, batch=1, device=CPU, flips=flips, after_batch=lambda: ticks.append(1)
    )
    wanted = []
    for turned in itertools.product(*[(False, True) if axis in flips else (False,) for axis in range(3)]):
        axes = [axis + 2 for axis in range(3) if turned[axis]]
        wanted.append(Lopsided()(image[None].flip(axes)).flip(axes)[0])
    assert len(wanted) == 2 ** len(flips)
    torch.testing.assert_close(logits, torch.stack(wanted).mean(0), rtol=1e-5, atol=1e-5)  # sums in another order
    assert len(ticks) == 1  # a batch of windows, however often it is looked at


def test_windows_are_blended_by_a_gaussian_or_equally_as_asked():
    class Place(nn.Module):
        """Answers with how often it was asked, so that the weights of two windows can be read off."""

        calls = 0

        def forward(self, windows):
            self.calls += 1
            return torch.full((1, 2, *windows.shape[2:]), float(self.calls))

    def along_x(blending):
        words = {"overlap": 0.5, "batch": 1, "device": CPU}
        return predict_logits(Place(), torch.zeros(1, 8, 8, 12), (8, 8, 8), blending=blending, **words)[0, 4, 4]

    assert along_x("constant").tolist() == pytest.approx([1] * 4 + [1.5] * 4 + [2] * 4)
    gaussian = along_x("gaussian").tolist()
    assert gaussian[:4] == pytest.approx([1] * 4)
    assert gaussian[4:8] == sorted(gaussian[4:8])
    assert gaussian[4] < 1.3
    assert gaussian[7] > 1.7


@pytest.mark.parametrize("blending", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("size", [(23, 12, 17), (8, 6, 10), (8, 19, 11)])
@pytest.mark.parametrize("batch", [1, 4])  # 4: batches hold windows of two rows
def test_planes_are_to_the_bit_what_monai_makes_of_the_whole_volume(size, overlap, blending, batch):
    torch.manual_seed(0)
    model = nn.Conv3d(2, 3, 3, padding=1).requires_grad_(False)
    image = torch.randn(2, *size)
    with torch.inference_mode():
        wanted = sliding_window_inference(image[None], (8, 6, 10), batch, model, overlap, mode=blending)[0]
    logits = predict_logits(model, image, (8, 6, 10), overlap=overlap, batch=batch, device=CPU, blending=blending)
    assert torch.equal(logits, wanted)


def test_planes_come_as_soon_as_no_window_adds_to_them_and_each_once():
    asked = []

    class Watched(InMemory):
        def planes(self, start, stop):
            asked.append((start, stop))
            return super().planes(start, stop)

    stream = predict_planes(Threshold(), Watched(torch.zeros(1, 24, 8, 8)), (8, 8, 8), overlap=0.5, batch=1, device=CPU)
    seen = []
    for part in stream:
        seen.append((part.shape[1], asked[-1]))
    assert seen == [(4, (4, 12)), (4, (8, 16)), (4, (12, 20)), (4, (16, 24)), (8, (16, 24))]
    assert asked == [(0, 8), (4, 12), (8, 16), (12, 20), (16, 24)]
