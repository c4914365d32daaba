"""LightningDataModules: digits, CIFAR, image folders, Tiny-ImageNet and Hugging Face data sets."""
