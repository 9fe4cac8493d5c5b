"""SimMIM with a ViT: `mimscale.models.simmim`."""

from typing import TYPE_CHECKING

from mimscale.models.activations import Activations, simmim_activations
from mimscale.models.config import SimmimConfig, VitConfig
from mimscale.models.flops import Flops, flops_by_part, repeated, simmim_products
from mimscale.models.parameters import linear_sizes, vit_sizes
from mimscale.train.config import PretrainConfig
from mimscale.train.method import Method, model_of
from mimscale.train.size import crop_shape

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
        products = simmim_products(model_of(config, VitConfig), config.simmim, crop_shape(config, channels))
        return flops_by_part(repeated(products, config.mask.repeats))

    def activations(self, config: PretrainConfig, width: int, channels: int) -> Activations:
        shape = crop_shape(config, channels)
        one = simmim_activations(
            model_of(config, VitConfig), numbers_a_patch=shape.numbers_a_patch, patches=shape.patches, width=width
        )
        return one.times(config.mask.repeats)


METHOD = _Simmim()
