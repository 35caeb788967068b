"""Made-up images in the range that a model was trained on.

Dead leaves are brought into it by the model's first BatchNormalization, whose running mean μ and
variance σ² were measured on training images. With L the linear and f₀ the constant part of what
stands before it, and x images of mean 0 and variance 1,

    image = a·x + b,    a² = median over channels o of σ²ₒ / Var L(x)ₒ,
    b = argmin Σₒ (f₀ + L(a·x̄ + b) − μ)²ₒ / σ²ₒ
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from onnxq.dead_leaves import Floats, dead_leaves
from onnxq.errors import OnnxqError
from onnxq.exported import settings
from onnxq.feeds import Feed
from onnxq.synthetic_inputs import Input, filled, open_session
from onnxq.tensors import is_external, read_in

_SIDE = 224  # pixels, of images whose size the model leaves open
_IMAGE_BUDGET = 1 << 26  # values in all images together
_LINEAR = {"Conv", "Transpose", "Identity", "Cast", "Add", "Sub", "Mul", "Div", "Pad"}
_LINEAR |= {"Reshape", "Squeeze", "Unsqueeze"}


def is_image(i: Input) -> bool:
    """A float or uint8 input of rank 4 with 1 or 3 channels and at least 8×8 pixels."""
    if len(i.shape) != 4 or not (i.dtype.kind == "f" or i.dtype == np.uint8) or i.is_state:
        return False
    _, height, width = _layout(i)
    return min(height, width) >= 8 and (i.shape[1] in (1, 3) or i.shape[3] in (1, 3))


def settled(i: Input, path: Path | None) -> Input:
    """An input of images whose every size is open, with the sizes of the config.json beside it."""
    known = settings(path) if path else {}
    side, channels = known.get("image_size"), known.get("num_channels", 3)
    open_sizes = len(i.shape) == 4 and not any(isinstance(dim, int) for dim in i.shape[1:])
    if not open_sizes or i.dtype.kind != "f" or i.is_state or side is None:
        return i
    sides = side if isinstance(side, list) else [side, side]
    return i._replace(shape=(i.shape[0], channels, *sides))


def _layout(i: Input) -> tuple[int, int, int]:
    """Channels, height, width."""
    _, *dims = i.sized(1, _SIDE)
    if i.shape[1] in (1, 3):
        return dims[0], dims[1], dims[2]
    return dims[2], dims[0], dims[1]


def image_feeds(
    model: onnx.ModelProto,
    inputs: list[Input],
    n: int,
    rng: np.random.Generator,
    path: Path | None,
) -> list[Feed]:
    batch = next((i.shape[0] for i in inputs if is_image(i) and isinstance(i.shape[0], int)), 1)
    streams: dict[str, NDArray[Any]] = {}
    for i in filter(is_image, inputs):
        channels, height, width = _layout(i)
        count = max(batch, min(n, _IMAGE_BUDGET // (channels * height * width)) // batch * batch)
        images = dead_leaves(rng, count, channels, height, width)
        if i.shape[1] not in (1, 3):
            images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        streams[i.name] = _in_range(model, i, images, path).astype(i.dtype)
    count = min(map(len, streams.values()))
    return [
        {
            i.name: streams[i.name][start : start + batch]
            if i.name in streams
            else filled(i, i.sized(batch, 16), rng)
            for i in inputs
        }
        for start in range(0, count, batch)
    ]


def _in_range(
    model: onnx.ModelProto, i: Input, images: Floats, path: Path | None
) -> NDArray[np.floating[Any]]:
    """Standard images in the range of the input, as far as the model tells it."""
    standard = np.asarray(np.clip(images, -2.5, 2.5), np.float32)
    if i.dtype == np.uint8:
        return np.asarray(np.clip(127.5 + 75 * images, 0, 255), np.float32)
    found = _first_normalization(model, i.name, path)
    if found is None:
        return standard
    before, mean, variance = found
    axis = 1 if i.shape[1] in (1, 3) else 3
    channels = images.shape[axis]
    step = i.shape[0] if isinstance(i.shape[0], int) else 1

    def response(x: NDArray[Any]) -> NDArray[Any]:
        """(images, out, pixels) before the normalization."""
        y = before.run(None, {i.name: x.astype(i.dtype)})[0]
        return np.asarray(y, np.float64).reshape(*y.shape[:2], -1)

    flat = np.zeros((channels + 1, *images.shape[1:]), np.float32)  # nothing, then each channel
    for channel in range(channels):
        flat.swapaxes(1, axis)[channel + 1, channel] = 1
    try:
        constant, *ones = (response(np.repeat(image[None], step, 0))[0] for image in flat)
        shown = range(0, min(len(images), 8), step)
        varied = np.concatenate([response(images[k : k + step]) for k in shown]) - constant
        fit = _fitted_range(constant, np.stack(ones) - constant, varied, mean, variance)
    except Exception:  # the model is stranger than it looked
        return standard
    if fit is None:
        return standard
    gain, offset = fit
    shape = [channels if a == axis else 1 for a in range(4)]
    return np.asarray(gain * images + offset.reshape(shape), np.float32)


def _fitted_range(
    constant: NDArray[Any],
    ones: NDArray[Any],
    varied: NDArray[Any],
    mean: NDArray[Any],
    variance: NDArray[Any],
) -> tuple[float, NDArray[np.float64]] | None:
    """Gain a and offset b (channels,) of the docstring above; None when nothing can be told.

    constant  (out, pixels): f₀
    ones      (channels, out, pixels): L of an image that is 1 in one channel
    varied    (images, out, pixels): L of images of mean 0 and variance 1
    mean, variance  (out,): μ and σ²
    """
    alive = (variance > 1e-4 * np.median(variance)) & (varied.var((0, 2)) > 0)
    if not alive.any():
        return None
    weight = 1 / np.sqrt(variance[alive])
    columns = ones.mean(2).T[alive] * weight[:, None]
    offset = np.zeros(len(ones))
    gain = 0.0
    for _ in range(3):
        # Padding makes borders in flat images too: that variance is not the images'.
        borders = (constant + np.tensordot(offset, ones, 1)).var(1)
        of_images = np.maximum(variance - borders, 0.1 * variance)[alive]
        gain = float(np.sqrt(np.median(of_images / varied.var((0, 2))[alive])))
        missing = (mean - constant.mean(1) - gain * varied.mean((0, 2)))[alive] * weight
        prior = 0.1 / gain * np.eye(len(ones))  # decides where filters hardly see a flat image
        offset, *_ = np.linalg.lstsq(
            np.concatenate([columns, prior]), np.concatenate([missing, np.zeros(len(ones))])
        )
    return gain, offset


def _first_normalization(
    model: onnx.ModelProto, name: str, path: Path | None
) -> tuple[ort.InferenceSession, NDArray[Any], NDArray[Any]] | None:
    """The affine part of the model from an input to the first BatchNormalization, as a session,
    with the running mean and variance (channels,); None when there is none."""
    constants = _constants(model, path)
    chain: list[onnx.NodeProto] = []
    tensor = name
    while True:
        readers = [node for node in model.graph.node if tensor in node.input]
        if not readers:
            return None
        node = readers[0]
        others = [x for x in node.input if x and x != tensor]
        if any(x not in constants for x in others):
            return None
        if node.op_type == "BatchNormalization":
            break
        if node.op_type not in _LINEAR:
            return None
        chain.append(node)
        tensor = node.output[0]
    needed = {x for step in chain for x in step.input if x in constants}
    try:
        weights = [constants[x]() for x in sorted(needed)]
        mean, variance = (
            onnx.numpy_helper.to_array(constants[x]()).astype(np.float64) for x in node.input[3:5]
        )
        graph = onnx.helper.make_graph(
            chain or [onnx.helper.make_node("Identity", [name], ["same"])],
            "before",
            [value for value in model.graph.input if value.name == name],
            [onnx.ValueInfoProto(name=tensor if chain else "same")],
            weights,
        )
        before = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
        before.opset_import.extend(model.opset_import)
        return open_session(before, None), mean, variance
    except (OnnxqError, OSError, ValueError, onnx.checker.ValidationError):
        return None


def _constants(
    model: onnx.ModelProto, path: Path | None
) -> dict[str, Callable[[], onnx.TensorProto]]:
    """Readers of the constant tensors: initializers, and values of Constant nodes."""

    def reader(tensor: onnx.TensorProto, name: str) -> Callable[[], onnx.TensorProto]:
        def read() -> onnx.TensorProto:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            copy.name = name
            if is_external(copy):
                if path is None:
                    raise OSError(f"the data of {name!r} are elsewhere")
                read_in(copy, path.parent)
            return copy

        return read

    found = {tensor.name: reader(tensor, tensor.name) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = reader(node.attribute[0].t, node.output[0])
    return found
