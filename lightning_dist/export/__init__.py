"""The export of a trained student to safetensors, a timm folder, torch.export or ONNX."""

from lightning_dist.export.formats import FORMATS, export_student

__all__ = ["FORMATS", "export_student"]
