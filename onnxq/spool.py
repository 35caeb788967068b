"""Large arrays wait on disk until somebody reads them: a weight is in memory while it is worked on.

The files are temporary; each goes when nothing refers to it any more, all of them with the process.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq.codebook import CodebookTensor
from onnxq.errors import OnnxqError
from onnxq.lattice import LatticeTensor
from onnxq.qtype import QTensor
from onnxq.scratch import scratch
from onnxq.storage import ExternalValues

Array = NDArray[Any]
Coded = TypeVar("Coded", QTensor, CodebookTensor | LatticeTensor)
LARGE = 1 << 22  # bytes; what is smaller stays in memory

_numbers = count()
_folder: Path | None = None


def spooled(name: str, values: Array) -> ExternalValues:
    """A tensor's values, written to disk. Raises OnnxqError when the disk is full."""
    global _folder
    if _folder is None:
        files = ExitStack()
        atexit.register(files.close)
        _folder = files.enter_context(scratch())
    path = _folder / f"{next(_numbers)}.bin"
    try:
        np.ascontiguousarray(values).tofile(path)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OnnxqError(
            f"no room for {values.nbytes >> 20} MiB in {str(_folder)!r} ({error}); set TMPDIR to a "
            "folder with more"
        ) from None
    proto = onnx.TensorProto(
        name=name,
        dims=values.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(values.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", path.name), ("offset", 0), ("length", values.nbytes)):
        proto.external_data.add(key=key, value=str(value))
    lazy = ExternalValues(proto, path.parent)
    lazy.owner = _Owner(path)  # which copies of the values share
    return lazy


class _Owner:
    """Removes a file when the last that refers to it is gone."""

    def __init__(self, path: Path) -> None:
        weakref.finalize(self, path.unlink, missing_ok=True)


class Weights(MutableMapping[str, Coded], Generic[Coded]):
    """Quantized weights by name; the codes of large ones on disk, read anew by each `[name]`."""

    def __init__(self) -> None:
        self._small: dict[str, Coded] = {}
        self._codes: dict[str, ExternalValues] = {}

    def __setitem__(self, name: str, q: Coded) -> None:
        self._codes.pop(name, None)
        if q.codes.nbytes >= LARGE:
            self._codes[name] = spooled(name, q.codes.view(f"u{q.codes.itemsize}"))
            q = replace(q, codes=np.empty(0, q.codes.dtype))
        self._small[name] = q

    def __getitem__(self, name: str) -> Coded:
        q = self._small[name]
        if name not in self._codes:
            return q
        return replace(q, codes=self._codes[name].read().view(q.codes.dtype))

    def __delitem__(self, name: str) -> None:
        del self._small[name]
        self._codes.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._small)

    def __len__(self) -> int:
        return len(self._small)

    def copy(self) -> Weights[Coded]:
        """Another mapping of the same weights."""
        twin: Weights[Coded] = Weights()
        twin._small, twin._codes = dict(self._small), dict(self._codes)
        return twin
