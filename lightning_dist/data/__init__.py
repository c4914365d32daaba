"""LightningDataModules for classification, detection and segmentation."""
