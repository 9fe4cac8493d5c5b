"""Masked autoencoder with a ViT: `mimscale.models.mae`."""

from typing import TYPE_CHECKING

from mimscale.models.activations import Activations, mae_activations
from mimscale.models.config import MaeConfig, VitConfig
from mimscale.models.flops import Flops, flops_by_part, mae_products, repeated
from mimscale.models.parameters import block_sizes, linear_sizes, vit_sizes
from mimscale.train.config import PretrainConfig
from mimscale.train.method import Method, model_of
from mimscale.train.size import crop_shape, visible_and_decoded

if TYPE_CHECKING:
    from torch import nn


class _Mae(Method):
    name = "mae"
    title = "masked autoencoder"
    settings = MaeConfig

    def build(self, config: PretrainConfig, channels: int) -> "nn.Module":
        from mimscale.models.mae import MaskedAutoencoder

        crop, patch = config.crop_voxels, config.patch_voxels
        return MaskedAutoencoder(
            model_of(config, VitConfig), config.mae, crop_voxels=crop, patch_voxels=patch, channels=channels
        )

    def problems(self, config: PretrainConfig) -> list[str]:
        problems = super().problems(config)
        if config.engine.compile_blocks and (changes := self.changing_shapes(config)) is not None:
            problems.append(
                f"engine.compile_blocks=true with {changes}: each number of visible patches would be compiled anew; "
                "give mask.ratio, or leave engine.compile_blocks out"
            )
        return problems

    def changing_shapes(self, config: PretrainConfig) -> str | None:
        ratios = config.mask.ratio_range
        return None if ratios is None else f"mask.ratio_range={list(ratios)}"

    def parameter_sizes(self, config: PretrainConfig, channels: int) -> list[int]:
        shape, D = crop_shape(config, channels), model_of(config, VitConfig).dim
        E, depth = config.mae.decoder_dim, config.mae.decoder_depth
        blocks = depth * block_sizes(VitConfig(dim=E, heads=config.mae.decoder_heads)) + (2 * [E] if depth else [])
        head = linear_sizes(E, shape.numbers_a_patch)
        return [*vit_sizes(model_of(config, VitConfig), shape), *linear_sizes(D, E), E, *blocks, *head]

    def flops(self, config: PretrainConfig, channels: int) -> dict[str, Flops]:
        """With a range of mask ratios, at its middle."""
        ratios = config.mask.ratio_range or (config.mask.ratio,)
        visible, decoded = visible_and_decoded(config, sum(ratios) / len(ratios))
        shape, vit = crop_shape(config, channels), model_of(config, VitConfig)
        products = mae_products(vit, config.mae, shape, visible_patches=visible, decoded_patches=decoded)
        return flops_by_part(repeated(products, config.mask.repeats))

    def activations(self, config: PretrainConfig, width: int, channels: int) -> Activations:
        """With a range of mask ratios, at its lowest, when most is kept."""
        visible, decoded = visible_and_decoded(config, (config.mask.ratio_range or (config.mask.ratio,))[0])
        one = mae_activations(
            model_of(config, VitConfig),
            config.mae,
            numbers_a_patch=crop_shape(config, channels).numbers_a_patch,
            visible_patches=visible,
            decoded_patches=decoded,
            width=width,
        )
        return one.times(config.mask.repeats)


METHOD = _Mae()
