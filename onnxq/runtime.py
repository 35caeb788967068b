"""ONNX Runtime sessions."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.storage import save_proto

Array = NDArray[Any]
_SERIALIZE_LIMIT = 1_800_000_000  # bytes; above it a model goes through a file


class Session:
    """A model ready to run: `run(feed, names)` gives arrays by name."""

    def __init__(
        self,
        model: str | Path | onnx.ModelProto,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        optimize: bool = True,
        threads: int | None = None,
        config: Mapping[str, str] | None = None,
        initializers: Mapping[str, Array] | None = None,
    ) -> None:
        """`initializers` are weights that the model itself leaves out.

        Raises OnnxqError when the runtime refuses the model or lacks the provider.
        """
        missing = [p for p in providers if p not in ort.get_available_providers()]
        if missing:
            have = ", ".join(ort.get_available_providers())
            raise OnnxqError(f"this onnxruntime has no {missing[0]}; it has {have}")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        )
        for key, value in (config or {}).items():
            options.add_session_config_entry(key, value)
        self._weights = {  # the session reads them where they are, so they must outlive it
            name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in (initializers or {}).items()
        }
        if self._weights:
            options.add_external_initializers(list(self._weights), list(self._weights.values()))
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        try:
            self.ort = ort.InferenceSession(self._source(model), options, providers=list(providers))
        except Exception as error:
            text = " ".join(str(error).split())
            raise OnnxqError(f"onnxruntime does not load the model: {text}") from None
        self.inputs = [value.name for value in self.ort.get_inputs()]
        self.outputs = [value.name for value in self.ort.get_outputs()]

    def _source(self, model: str | Path | onnx.ModelProto) -> str | bytes:
        if not isinstance(model, onnx.ModelProto):
            return str(model)
        tensors = model.graph.initializer
        external = any(t.external_data for t in tensors) and not self._weights
        if not external and sum(len(t.raw_data) for t in tensors) < _SERIALIZE_LIMIT:
            return bytes(model.SerializeToString())
        self._scratch = tempfile.TemporaryDirectory(prefix="onnxq-")
        path = Path(self._scratch.name) / "model.onnx"
        save_proto(model, path)
        return str(path)

    def run(
        self, feed: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Outputs by name. Raises OnnxqError when the model does not run on this feed."""
        names = list(names or self.outputs)
        try:
            known = {name: feed[name] for name in feed if name in self.inputs}
            return dict(zip(names, self.ort.run(names, known), strict=True))
        except Exception as error:
            text = " ".join(str(error).split())
            raise OnnxqError(f"the model does not run on this sample: {text}") from None
