"""What every encoder is to those who train, transfer and export it.

Its weights carry the same names whatever stands behind it: `encoder.blocks.N` for what layer decay counts, and
`encoder.norm` for the end; everything else is the embedding.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from mimscale.models.config import EncoderConfig, Zyx

END = ("blocks.", "norm.")  # of the encoder's names: all but the embedding


class Encoder(nn.Module):
    """Base of all encoders."""

    repeated: ClassVar[tuple[type[nn.Module], ...]] = ()  # what torch.compile takes one by one, in decoders too
    config: EncoderConfig

    def __init__(self, config: EncoderConfig, channels: int, patch_voxels: Sequence[int] | None = None) -> None:
        """`channels` are those of the image, `patch_voxels` edges of a token; None where weights fit any patch."""
        super().__init__()
        self.config = config
        self.channels = channels
        self.patch_voxels = None if patch_voxels is None else tuple(patch_voxels)

    def adapted(self, name: str, tensor: Tensor, channels: int) -> tuple[Tensor, str]:
        """A tensor of another encoder as this one needs it, and what was changed.

        Args:
            name: of the tensor, without `encoder.`; its shape is not the one here.
            tensor: from an encoder of the same architecture.
            channels: of the image that it was trained on.

        Returns:
            The tensor as it came, and a reason or nothing, where no rule applies.
        """
        return tensor, ""


def tokens_and_grid(answer: Any, grid: Zyx | None) -> tuple[Tensor, Zyx]:
    """Tokens [B, L, D] of what an encoder answers, and how many lie along Z, Y and X.

    Args:
        answer: of a ViT its tokens [B, L, D] and something more; of an encoder with stages a map [B, D, z, y, x] of
            each, the deepest last: that one counts.
        grid: of a ViT's tokens.
    """
    first, last = answer[0], answer[-1]
    if first.ndim == 3:
        assert grid is not None, "an encoder that answers with tokens has a grid"
        return first, grid
    z, y, x = last.shape[2:]
    return last.flatten(2).transpose(1, 2), (z, y, x)


def spread_channel(tensor: Tensor, theirs: int, ours: int) -> tuple[Tensor, str]:
    """Weights on one channel as weights on several that give the same sum when all channels are equal.

    Args:
        tensor: weights, [outputs, numbers of the image, ...]; the channel runs fastest among these numbers.
        theirs: channels of the tensor.
        ours: channels that are wanted.
    """
    if theirs != 1:
        return tensor, f" ({theirs} -> {ours} channels; only 1 -> N is defined)"
    return tensor.repeat_interleave(ours, dim=1) / ours, f"1 -> {ours} channels"
