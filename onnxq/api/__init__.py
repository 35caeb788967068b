"""What the command line and Python users call."""

from onnxq.api.benchmark import bench
from onnxq.api.inspection import inspect
from onnxq.api.quantization import quantize
from onnxq.api.validation import validate

__all__ = ["bench", "inspect", "quantize", "validate"]
