"""LightningDataModules for classification, detection and segmentation, and what they share."""
