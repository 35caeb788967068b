"""A target that is measured: what a provider runs on this device, how exactly and how fast."""

from onnxq.probing.probe import Probed, default_places, probe

__all__ = ["Probed", "default_places", "probe"]
