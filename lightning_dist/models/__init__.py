"""Networks that neither timm nor torchvision contains."""
