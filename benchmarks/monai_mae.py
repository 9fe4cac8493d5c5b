"""MONAI's masked autoencoder, built as one of our runs has its own."""

import warnings

from torch import nn

from mimscale.train.config import PretrainConfig


def monai_network(config: PretrainConfig, channels: int) -> nn.Module:
    """MONAI's MaskedAutoEncoderViT: [B, C, Z, Y, X] -> prediction [B, L, P] and hidden patches [B, L].

    Its axes have no names, so our Z, Y, X may stand where it says height, width, depth.
    """
    from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT

    vit, mae = config.model, config.mae
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)  # of its sines
        return MaskedAutoEncoderViT(
            in_channels=channels,
            img_size=config.crop_voxels,
            patch_size=config.patch_voxels,
            hidden_size=vit.dim,
            mlp_dim=vit.mlp_dim,
            num_layers=vit.depth,
            num_heads=vit.heads,
            masking_ratio=config.mask.ratio,
            decoder_hidden_size=mae.decoder_dim,
            decoder_mlp_dim=4 * mae.decoder_dim,
            decoder_num_layers=mae.decoder_depth,
            decoder_num_heads=mae.decoder_heads,
            # Its sines need a width that is a multiple of 6.
            pos_embed_type="sincos" if vit.dim % 6 == 0 else "learnable",
            decoder_pos_embed_type="sincos" if mae.decoder_dim % 6 == 0 else "learnable",
            qkv_bias=True,
        )
