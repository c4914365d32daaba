"""Networks that neither timm nor torchvision has."""
