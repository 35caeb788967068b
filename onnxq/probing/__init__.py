"""A target that is measured: what a provider runs on this device, how exactly and how fast."""

from onnxq.probing.run import Probed, default_places, paths_of, probe, to_json

__all__ = ["Probed", "default_places", "paths_of", "probe", "to_json"]
