"""What the parts of a network have and need, as sums: weights, products, and what is kept. Without torch.

A network is a sum of tallies, so its size, FLOPs and memory follow from one description. Numbers are those of one
sample. What is kept is what the operations name: a convolution and a norm their input, a bend that works in place its
output.

V voxels or tokens
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mimscale.models.activations import FP32_BYTES, INT64_BYTES, Activations
from mimscale.models.config import TargetConfig, Zyx
from mimscale.models.flops import Product


@dataclass(frozen=True, kw_only=True)
class Tally:
    """One part, or several together."""

    sizes: tuple[int, ...] = ()  # numbers in each weight
    products: tuple[Product, ...] = ()
    # Kept for the backward pass:
    numbers: int = 0  # in the precision of the model
    fp32: int = 0
    int64: int = 0
    narrowed: int = 0  # of the fp32 ones, those that a model of another precision keeps in its own as well
    recomputed: tuple["Tally", ...] = ()  # blocks of which only the input is kept
    gradients: int = 0  # numbers that the backward pass holds at its start, while nearly all is still kept

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            sizes=self.sizes + other.sizes,
            products=self.products + other.products,
            numbers=self.numbers + other.numbers,
            fp32=self.fp32 + other.fp32,
            int64=self.int64 + other.int64,
            narrowed=self.narrowed + other.narrowed,
            recomputed=self.recomputed + other.recomputed,
            gradients=max(self.gradients, other.gradients),
        )

    def kept_bytes(self, width: int) -> int:
        """Of a model whose numbers are `width` bytes."""
        narrowed = self.narrowed * width if width != FP32_BYTES else 0
        return self.numbers * width + self.fp32 * FP32_BYTES + self.int64 * INT64_BYTES + narrowed


def tallied(parts: Sequence[Tally]) -> Tally:
    """Their sum."""
    return sum(parts, start=Tally())


def checkpointed(block: Tally, *, kept: int, fp32_work: int = 0) -> Tally:
    """A block that is computed again in the backward pass.

    Args:
        block: as it is without that.
        kept: numbers that it keeps until then.
        fp32_work: numbers that it holds on top of what it keeps, while it is computed again.
    """
    products = tuple(replace(product, recomputed=product.recomputed + 1) for product in block.products)
    return Tally(sizes=block.sizes, products=products, numbers=kept, recomputed=(block + Tally(fp32=fp32_work),))


def linear(part: str, rows: int, inputs: int, outputs: int, *, bias: bool = True) -> Tally:
    """A linear layer, or a convolution of 1^3; what it keeps is tallied where it is made."""
    product = Product(part=part, rows=rows, inner=inputs, columns=outputs)
    return Tally(sizes=(inputs * outputs, *((outputs,) if bias else ())), products=(product,))


def convolution(
    part: str, rows: int, inputs: int, outputs: int, kernel: Zyx, *, bias: bool = True, of_image: bool = False
) -> Tally:
    """A convolution with V = `rows` voxels behind it."""
    edge = math.prod(kernel)
    product = Product(part=part, rows=rows, inner=edge * inputs, columns=outputs, of_image=of_image)
    return Tally(sizes=(edge * inputs * outputs, *((outputs,) if bias else ())), products=(product,))


def transposed(part: str, rows: int, inputs: int, outputs: int, stride: Zyx, *, bias: bool = True) -> Tally:
    """A transposed convolution whose kernel is its stride: each of V = `rows` voxels becomes a block of them."""
    block = math.prod(stride)
    product = Product(part=part, rows=rows, inner=inputs, columns=outputs * block)
    return Tally(sizes=(inputs * outputs * block, *((outputs,) if bias else ())), products=(product,))


def residual_block(part: str, rows: int, inputs: int, outputs: int, *, of_image: bool = False) -> Tally:
    """MONAI's UnetResBlock: norms without weights, a shortcut of 1^3 where the width changes; its own numbers."""
    kernel: Zyx = (3, 3, 3)
    first = convolution(part, rows, inputs, outputs, kernel, bias=False, of_image=of_image)
    second = convolution(part, rows, outputs, outputs, kernel, bias=False)
    if inputs == outputs:
        return first + second + Tally(numbers=4 * rows * outputs)
    shortcut = convolution(part, rows, inputs, outputs, (1, 1, 1), bias=False, of_image=of_image)
    return first + second + shortcut + Tally(numbers=5 * rows * outputs)


def masked_loss(target: TargetConfig, *, numbers: int, answered: int) -> Tally:
    """Of a network that predicts `numbers` voxels, of which `answered` are asked for: what it keeps.

    These are gathered from all; the error is fp32, and a byte says which of them count.
    """
    bools = -(-answered // FP32_BYTES)
    if target.loss_on == "all":
        return Tally(fp32=answered + bools)
    return Tally(numbers=numbers, fp32=answered + bools)


def segmentation_loss(voxels: int, outputs: int) -> Tally:
    """Log-probabilities and probabilities; the classes as one number each and as a label; which voxels count."""
    return Tally(fp32=2 * voxels * outputs + -(-voxels // FP32_BYTES), int64=voxels * (outputs + 1))


def masked_loss_bytes(numbers: int, answered: int, width: int) -> int:
    """Held while it is computed: the target of all voxels, then target and error of those that are asked for."""
    return numbers * FP32_BYTES + answered * (width + 2 * FP32_BYTES)


def segmentation_loss_bytes(voxels: int, outputs: int, width: int) -> int:
    """Held while it is computed: scores, and two products of probabilities and classes."""
    return voxels * outputs * (width + 2 * FP32_BYTES)


def activations(tally: Tally, width: int, *, transient: int) -> Activations:
    """Bytes of one sample; `transient` are those that the loss holds while it is computed."""
    # An upper bound: some of what is kept is gone by the time that the largest block is computed again.
    block = max((block.kept_bytes(width) for block in tally.recomputed), default=0)
    return Activations(
        kept=tally.kept_bytes(width), transient=transient, recomputed=max(tally.gradients * width, block)
    )
