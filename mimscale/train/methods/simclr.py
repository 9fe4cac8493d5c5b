"""SimCLR with a ViT: `mimscale.models.simclr`, `mimscale.train.contrast`."""

from typing import TYPE_CHECKING

from mimscale.models.activations import Activations, encoder_activations
from mimscale.models.config import SimclrConfig, VitConfig
from mimscale.models.flops import Flops, flops_by_part, repeated, simclr_products
from mimscale.models.parameters import linear_sizes, vit_sizes
from mimscale.stream.config import AugmentConfig
from mimscale.train.config import PretrainConfig
from mimscale.train.method import Method, model_of
from mimscale.train.size import crop_shape

if TYPE_CHECKING:
    from torch import nn

    from mimscale.train.objective import Objective

VIEWS = 2  # of each crop


class _Simclr(Method):
    name = "simclr"
    title = "encoder pretrained with SimCLR"
    settings = SimclrConfig

    def build(self, config: PretrainConfig, channels: int) -> "nn.Module":
        from mimscale.models.simclr import Simclr

        crop, patch = config.crop_voxels, config.patch_voxels
        return Simclr(
            model_of(config, VitConfig), config.simclr, crop_voxels=crop, patch_voxels=patch, channels=channels
        )

    def objective(self, config: PretrainConfig) -> "Objective":
        from mimscale.train.contrast import Contrast

        return Contrast(config)

    def problems(self, config: PretrainConfig) -> list[str]:
        """Two views that would be one, or voxels to exclude where none are predicted."""
        problems = []
        if config.augment == AugmentConfig():
            problems.append(
                "method=simclr: nothing is augmented, so the two views of a crop would be the same; set augment.*, as "
                "recipe pretrain_simclr_vit_b does"
            )
        if config.exclude_overlay is not None:
            problems.append(f"exclude_overlay={config.exclude_overlay}: method=simclr predicts no voxels; leave it out")
        return problems

    def problem_of_ranks(self, config: PretrainConfig, world_size: int) -> str | None:
        """Crops that are computed at once must be those that are to be told apart."""
        pool_crops, at_once = config.simclr.pool_crops or config.global_batch, config.micro_batch * world_size
        if at_once == pool_crops:
            return None
        return (
            f"simclr.pool_crops={config.simclr.pool_crops}: {pool_crops} crops are to be told apart, but "
            f"micro_batch={config.micro_batch} on {world_size} rank(s) computes {at_once} at once; set "
            f"micro_batch={pool_crops / world_size:g}, or simclr.pool_crops={at_once} (another loss)"
        )

    def parameter_sizes(self, config: PretrainConfig, channels: int) -> list[int]:
        vit, width = model_of(config, VitConfig), config.simclr.hidden_dim
        projection = linear_sizes(vit.dim, width) + linear_sizes(width, config.simclr.projection_dim)
        return vit_sizes(vit, crop_shape(config, channels)) + projection

    def flops(self, config: PretrainConfig, channels: int) -> dict[str, Flops]:
        products = simclr_products(model_of(config, VitConfig), config.simclr, crop_shape(config, channels))
        return flops_by_part(repeated(products, VIEWS))

    def activations(self, config: PretrainConfig, width: int, channels: int) -> Activations:
        shape = crop_shape(config, channels)
        one = encoder_activations(
            model_of(config, VitConfig), numbers_a_patch=shape.numbers_a_patch, tokens=shape.patches, width=width
        )
        return one.times(VIEWS)


METHOD = _Simclr()
