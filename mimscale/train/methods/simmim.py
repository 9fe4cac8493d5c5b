"""SimMIM with a ViT: `mimscale.models.simmim`."""

from typing import TYPE_CHECKING

from mimscale.models.activations import Activations, simmim_activations
from mimscale.models.config import SimmimConfig, VitConfig
from mimscale.models.flops import Flops, answered_patches, flops_by_part, repeated, simmim_products
from mimscale.models.parameters import linear_sizes, vit_sizes
from mimscale.train.config import PretrainConfig
from mimscale.train.method import Method, model_of
from mimscale.train.size import crop_shape, visible_and_decoded

if TYPE_CHECKING:
    from torch import nn


class _Simmim(Method):
    name = "simmim"
    title = "encoder pretrained with SimMIM"
    settings = SimmimConfig

    def build(self, config: PretrainConfig, channels: int) -> "nn.Module":
        from mimscale.models.simmim import Simmim

        crop, patch = config.crop_voxels, config.patch_voxels
        return Simmim(
            model_of(config, VitConfig), config.simmim, crop_voxels=crop, patch_voxels=patch, channels=channels
        )

    def parameter_sizes(self, config: PretrainConfig, channels: int) -> list[int]:
        shape, D = crop_shape(config, channels), model_of(config, VitConfig).dim
        middle = linear_sizes(D, D) if config.simmim.head == "mlp" else []
        return [*vit_sizes(model_of(config, VitConfig), shape), D, *middle, *linear_sizes(D, shape.numbers_a_patch)]

    def flops(self, config: PretrainConfig, channels: int) -> dict[str, Flops]:
        """With a range of mask ratios, at its middle."""
        ratios = config.mask.ratio_range or (config.mask.ratio,)
        answered = answered_patches(config.simmim, *visible_and_decoded(config, sum(ratios) / len(ratios)))
        shape, vit = crop_shape(config, channels), model_of(config, VitConfig)
        products = simmim_products(vit, config.simmim, shape, answered_patches=answered)
        return flops_by_part(repeated(products, config.mask.repeats))

    def activations(self, config: PretrainConfig, width: int, channels: int) -> Activations:
        """With a range of mask ratios, at its lowest."""
        shape = crop_shape(config, channels)
        ratio = (config.mask.ratio_range or (config.mask.ratio,))[0]
        one = simmim_activations(
            model_of(config, VitConfig),
            numbers_a_patch=shape.numbers_a_patch,
            patches=shape.patches,
            answered_patches=answered_patches(config.simmim, *visible_and_decoded(config, ratio)),
            width=width,
        )
        return one.times(config.mask.repeats)


METHOD = _Simmim()
