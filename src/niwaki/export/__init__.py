"""What leaves PyTorch: one format per file, each run in its own runtime before it is handed over."""

from niwaki.export.onnx import export_onnx
from niwaki.export.pretrained import export_pretrained, fitted_config
from niwaki.export.qdq import export_qdq, kernels_of
from niwaki.export.runtimes import time_files
from niwaki.verbs import callable_module

__all__ = ["export_onnx", "export_pretrained", "export_qdq", "fitted_config", "kernels_of", "time_files"]

VERB = "export_onnx"
callable_module(__name__)
