"""Networks: patches, masking, ViT, masked autoencoder, UNETR, weight transfer."""
