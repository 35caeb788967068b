"""Run models where they will be used: any execution provider, in any Python, on any machine."""

from onnxq.devices.place import Answer, Job, Kernel, Place, ask

__all__ = ["Answer", "Job", "Kernel", "Place", "ask"]
