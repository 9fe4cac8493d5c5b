"""The parts of a U-Net with a residual encoder (`mimscale.models.resenc`), counted. Without torch.

F features of a stage | V voxels of a stage
"""

import math

from mimscale.models.config import ResencConfig, Zyx
from mimscale.models.flops import CropShape
from mimscale.models.tally import Tally, checkpointed, convolution, linear, segmentation_loss, tallied, transposed


def resenc_tally(resenc: ResencConfig, shape: CropShape, outputs: int) -> Tally:
    """Encoder, decoder, and `outputs` numbers a voxel."""
    voxels, width = math.prod(shape.crop_voxels), resenc.features[0]
    # Of the finest features, before and behind the norm, and of what the first convolution of the decoder is given.
    last = Tally(gradients=3 * voxels * width)
    return tallied(
        [resenc_encoder(resenc, shape), _decoder(resenc, shape), linear("head", voxels, width, outputs), last]
    )


def coarse_outputs(resenc: ResencConfig, shape: CropShape, outputs: int) -> Tally:
    """Scores of the coarser stages of the decoder, and their losses, of deep supervision."""
    voxels = stage_voxel_counts(resenc, shape)
    stages = range(1, len(voxels) - 1)
    return tallied(
        [
            linear("head", voxels[stage], resenc.features[stage], outputs) + segmentation_loss(voxels[stage], outputs)
            for stage in stages
        ]
    )


def stage_voxel_counts(resenc: ResencConfig, shape: CropShape) -> list[int]:
    """V of each stage, finest first."""
    return [math.prod(edges) for edges in resenc.stage_voxels(shape.crop_voxels)]


def resenc_encoder(resenc: ResencConfig, shape: CropShape) -> Tally:
    """The encoder alone."""
    voxels, widths = math.prod(shape.crop_voxels), resenc.features
    image = Tally(numbers=voxels * shape.channels)
    stem = _conv_norm("encoder", voxels, shape.channels, widths[0], resenc.stage_kernels[0], of_image=True)
    stages, inputs = [], widths[0]
    for rows, outputs, count, stride, kernel in zip(
        stage_voxel_counts(resenc, shape),
        widths,
        resenc.blocks,
        resenc.stage_strides,
        resenc.stage_kernels,
        strict=True,
    ):
        first = _residual_block(rows, inputs, outputs, kernel, strided=max(stride) > 1)
        others = (count - 1) * [_residual_block(rows, outputs, outputs, kernel, strided=False)]
        stages.append(_block(resenc, tallied([first, *others]), rows * outputs))
        inputs = outputs
    return tallied([image, stem, *stages])


def _decoder(resenc: ResencConfig, shape: CropShape) -> Tally:
    voxels, parts = stage_voxel_counts(resenc, shape), []
    for stage in reversed(range(len(voxels) - 1)):
        below, width = resenc.features[stage + 1], resenc.features[stage]
        rows, kernel = voxels[stage], resenc.stage_kernels[stage]
        parts.append(transposed("decoder", voxels[stage + 1], below, width, resenc.stage_strides[stage + 1]))
        parts.append(Tally(numbers=2 * rows * width))  # side by side with the encoder's
        inputs = (2 * width, *(resenc.decoder_convs - 1) * (width,))
        convs = [_conv_norm("decoder", rows, count, width, kernel) for count in inputs]
        parts.append(_block(resenc, tallied(convs), rows * width))
    return tallied(parts)


def _block(resenc: ResencConfig, block: Tally, outputs: int) -> Tally:
    """A block as the config computes it; its output is the input of whatever follows."""
    return checkpointed(block, kept=outputs) if resenc.checkpoint_activations else block


def _residual_block(rows: int, inputs: int, outputs: int, kernel: Zyx, *, strided: bool) -> Tally:
    first = _conv_norm("encoder", rows, inputs, outputs, kernel)
    second = _conv_norm("encoder", rows, outputs, outputs, kernel, bend=False)
    parts = [first, second, Tally(numbers=rows * outputs)]  # the bent sum
    if inputs != outputs:
        parts.append(_conv_norm("encoder", rows, inputs, outputs, (1, 1, 1), bias=False, bend=False))
        parts.append(Tally(numbers=rows * inputs if strided else 0))  # the average that it reads
    return tallied(parts)


def _conv_norm(
    part: str,
    rows: int,
    inputs: int,
    outputs: int,
    kernel: Zyx,
    *,
    bias: bool = True,
    bend: bool = True,
    of_image: bool = False,
) -> Tally:
    """Convolution, norm with weights, and a bend in place."""
    conv = convolution(part, rows, inputs, outputs, kernel, bias=bias, of_image=of_image)
    return conv + Tally(sizes=(outputs, outputs), numbers=rows * outputs * (2 if bend else 1))
