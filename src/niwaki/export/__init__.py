"""What leaves PyTorch: one format per file, each run in its own runtime before it is handed over."""

from niwaki.export.onnx import export_onnx

__all__ = ["export_onnx"]
