"""Makes up samples for a model when the user has none.

Images are dead leaves: discs that hide each other, with radii r of density ∝ r⁻³, which have the
edges and the power spectrum of natural images (Lee, Mumford and Huang, "Occlusion Models for
Natural Images", 2001); some are striped. They are brought into the range that the model was
trained on by its first BatchNormalization, whose running mean μ and variance σ² were measured on
training images. With L the linear and f₀ the constant part of what stands before it, and x images
of mean 0 and variance 1,

    image = a·x + b,    a² = median over channels o of σ²ₒ / Var L(x)ₒ,
    b = argmin Σₒ (f₀ + L(a·x̄ + b) − μ)²ₒ / σ²ₒ

Language models write their own samples (Liu et al., "LLM-QAT", 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from onnxq.errors import OnnxqError
from onnxq.runtime import Session

Feed = dict[str, NDArray[Any]]
Floats = NDArray[np.float32]
Kind = Literal["images", "language model", "tokens", "random"]

_SIDE = 224  # pixels, of images whose size the model leaves open
_LENGTH = 64  # tokens, of sequences whose length the model leaves open
_TOP = 40  # likeliest tokens to choose the next one from
_TEXT_BUDGET = 4e12  # multiply-adds for writing text: large models write fewer sequences
_IMAGE_BUDGET = 1 << 26  # values in all images together
_LINEAR = {"Conv", "Transpose", "Identity", "Cast", "Add", "Sub", "Mul", "Div", "Pad"}
_LINEAR |= {"Reshape", "Squeeze", "Unsqueeze"}
_INDEX_ONLY = {"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}


class _Input(NamedTuple):
    """As the runtime declares it; a dimension is a size, a symbol or None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def sized(self, batch: int, other: int) -> tuple[int, ...]:
        """The shape with the open dimensions filled in."""
        return tuple(
            dim if isinstance(dim, int) else batch if i == 0 or "batch" in str(dim) else other
            for i, dim in enumerate(self.shape)
        )

    def is_a(self, *words: str) -> bool:
        return any(word in self.name.lower() for word in words)

    @property
    def is_state(self) -> bool:
        return self.is_a("cache", "past") or (self.is_a("state") and not self.is_a("encoder"))


def synthesize(
    model: onnx.ModelProto, *, n: int = 32, seed: int = 0, path: Path | None = None
) -> tuple[list[Feed], Kind]:
    """`n` made-up samples that the model runs on, and what they are; the same for the same seed.

    "images"          n images, as many to a feed as the model takes at a time
    "language model"  sequences of 64 tokens that the model wrote; fewer of a large model
    "tokens"          n sequences of 8 to 64 random ids
    "random"          n feeds of normal floats, zero integers

    `path` is the model's file; it is needed where weights are external data.
    Raises OnnxqError when no samples can be made up that the model runs on.
    """
    session = _session(model, path)
    rng = np.random.default_rng(seed)
    inputs = [_input(value) for value in session.get_inputs()]
    vocabularies = {
        i.name: rows
        for i in inputs
        if i.dtype.kind in "iu"
        and not i.is_a("mask", "type", "segment", "position")
        and (rows := _vocabulary(model, i.name))
    }
    kind: Kind = "random"
    if any(_is_image(i) for i in inputs):
        kind = "images"
        feeds = _image_feeds(model, inputs, n, rng, path)
    elif vocabularies and all(_is_text(i) for i in inputs):
        kind = "tokens"
        longest = _longest(session, inputs, vocabularies)
        feeds = _token_feeds(inputs, vocabularies, n, longest, rng)
        if _predicts_next(session, inputs, vocabularies):
            kind = "language model"
            n = _affordable(model, n)
            feeds = _written_feeds(session, inputs, vocabularies, n, longest, rng)
    else:
        feeds = _random_feeds(session, inputs, n, rng)
    if any(np.isnan(y).any() for y in _run(session, feeds[0]) if _is_float(y)):
        raise _impossible(ValueError("its output is not a number"))
    return feeds, kind


def _is_float(y: object) -> bool:
    return isinstance(y, np.ndarray) and y.dtype.kind == "f"


def _session(model: onnx.ModelProto, path: Path | None) -> ort.InferenceSession:
    return Session(path or model).ort


def _run(session: ort.InferenceSession, feed: Feed) -> list[Any]:
    try:
        return list(session.run(None, feed))
    except Exception as error:
        raise _impossible(error) from error


def _impossible(error: Exception) -> OnnxqError:
    reason = " ".join(str(error).split())[:300]
    return OnnxqError(f"samples cannot be made up for this model ({reason}); give --data")


def _input(value: ort.NodeArg) -> _Input:
    names = {"float": "float32", "double": "float64"}
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    try:
        return _Input(value.name, np.dtype(names.get(kind, kind)), tuple(value.shape))
    except TypeError:
        reason = TypeError(f"input {value.name!r} is a {value.type}")
        raise _impossible(reason) from None


def _filled(i: _Input, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    """What an input gets that is neither image nor token ids."""
    if i.is_state:
        return np.zeros(shape, i.dtype)
    if i.dtype.kind == "b" or i.is_a("mask"):
        return np.ones(shape, i.dtype)
    if i.is_a("position") and i.dtype.kind in "iu" and shape:
        return np.broadcast_to(np.arange(shape[-1], dtype=i.dtype), shape).copy()
    if i.dtype.kind in "iu":
        return np.zeros(shape, i.dtype)
    return np.asarray(rng.standard_normal(shape)).astype(i.dtype)


def _random_feeds(
    session: ort.InferenceSession, inputs: list[_Input], n: int, rng: np.random.Generator
) -> list[Feed]:
    """Open dimensions get 16, or the first longer size that the model runs with."""

    def feed(size: int) -> Feed:
        return {i.name: _filled(i, i.sized(1, size), rng) for i in inputs}

    for size in (16, 128, 512):
        try:
            _run(session, feed(size))
        except OnnxqError:
            continue
        return [feed(size) for _ in range(n)]
    return [feed(16)]


# Images


def _is_image(i: _Input) -> bool:
    """A float or uint8 input of rank 4 with 1 or 3 channels and at least 8×8 pixels."""
    if len(i.shape) != 4 or not (i.dtype.kind == "f" or i.dtype == np.uint8) or i.is_state:
        return False
    _, height, width = _layout(i)
    return min(height, width) >= 8 and (i.shape[1] in (1, 3) or i.shape[3] in (1, 3))


def _layout(i: _Input) -> tuple[int, int, int]:
    """Channels, height, width."""
    _, *dims = i.sized(1, _SIDE)
    if i.shape[1] in (1, 3):
        return dims[0], dims[1], dims[2]
    return dims[2], dims[0], dims[1]


def _image_feeds(
    model: onnx.ModelProto,
    inputs: list[_Input],
    n: int,
    rng: np.random.Generator,
    path: Path | None,
) -> list[Feed]:
    batch = next((i.shape[0] for i in inputs if _is_image(i) and isinstance(i.shape[0], int)), 1)
    streams: dict[str, NDArray[Any]] = {}
    for i in filter(_is_image, inputs):
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
            else _filled(i, i.sized(batch, 16), rng)
            for i in inputs
        }
        for start in range(0, count, batch)
    ]


def dead_leaves(
    rng: np.random.Generator, count: int, channels: int, height: int, width: int
) -> Floats:
    """Images (count, channels, height, width) float32, of mean 0 and variance 1 altogether."""
    images = np.stack([_leaves(rng, channels, height, width) for _ in range(count)])
    return np.asarray((images - images.mean()) / images.std(), np.float32)


def _leaves(rng: np.random.Generator, channels: int, height: int, width: int) -> Floats:
    side, discs = max(height, width), 400
    smallest, largest = side / 56, side / 2
    share = 1 - (smallest / largest) ** 2
    radius = smallest / np.sqrt(1 - share * rng.random(discs))
    top, left = rng.uniform(0, height, discs), rng.uniform(0, width, discs)
    owner = np.zeros((height, width), np.int16)
    ys, xs = np.arange(height)[:, None], np.arange(width)[None]
    for disc, (r, y, x) in enumerate(zip(radius, top, left, strict=True), 1):
        rows = slice(max(0, int(y - r)), int(y + r) + 1)
        columns = slice(max(0, int(x - r)), int(x + r) + 1)
        inside = (ys[rows] - y) ** 2 + (xs[:, columns] - x) ** 2 < r * r
        owner[rows, columns][inside] = disc
    light = rng.uniform(-1, 1, (1, discs + 1))
    colour = rng.uniform(-1, 1, (channels, discs + 1))
    # Photographs have black and white in them: a part of the leaves saturates.
    colours = np.clip(1.3 * light + (0.5 * colour if channels > 1 else 0), -1, 1)
    stripes = _stripes(rng, owner, discs)
    image = colours[:, owner] + stripes + 0.1 * _pink(rng, height, width)
    return np.asarray(_smooth(np.clip(image, -1, 1)), np.float32)


def _stripes(rng: np.random.Generator, owner: NDArray[np.int16], discs: int) -> NDArray[np.float64]:
    """Waves (height, width) on two leaves of five, the texture that flat discs lack; without it
    the middle layers of a classifier see less than on photographs."""
    strength = rng.uniform(0, 0.5, discs + 1) * (rng.random(discs + 1) < 0.4)
    lowest, highest = 4 / max(owner.shape), 0.25  # cycles per pixel
    frequency = lowest * (highest / lowest) ** rng.random(discs + 1)
    angle, phase = 2 * np.pi * rng.random((2, discs + 1))
    wave_y, wave_x = 2 * np.pi * frequency * (np.cos(angle), np.sin(angle))
    y, x = np.ogrid[: owner.shape[0], : owner.shape[1]]
    return np.asarray(
        strength[owner] * np.sin(wave_y[owner] * y + wave_x[owner] * x + phase[owner])
    )


def _pink(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """Noise (height, width) of variance 1 whose amplitude falls as 1 / frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(
        np.fft.rfft2(rng.standard_normal((height, width))) / frequency, (height, width)
    )
    return np.asarray(noise / noise.std())


def _smooth(image: NDArray[Any]) -> NDArray[Any]:
    """(1, 2, 1) / 4 along both axes of the pixels."""
    for axis in (1, 2):
        wide = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        size = image.shape[axis]
        before, after = (wide.take(range(s, s + size), axis) for s in (0, 2))
        image = (before + 2 * image + after) / 4
    return image


def _in_range(
    model: onnx.ModelProto, i: _Input, images: Floats, path: Path | None
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
        return _session(before, None), mean, variance
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
            if uses_external_data(copy):
                if path is None:
                    raise OSError(f"the data of {name!r} are elsewhere")
                load_external_data_for_tensor(copy, str(path.parent))
                copy.ClearField("external_data")
                copy.data_location = onnx.TensorProto.DEFAULT
            return copy

        return read

    found = {tensor.name: reader(tensor, tensor.name) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = reader(node.attribute[0].t, node.output[0])
    return found


# Text


def _is_text(i: _Input) -> bool:
    return i.dtype.kind in "iub" or i.is_state or i.is_a("mask")


def _vocabulary(model: onnx.ModelProto, ids: str) -> int:
    """Rows of the table that an input of ids looks up; 0 when there is none."""
    tables = {t.name: t.dims[0] for t in model.graph.initializer if len(t.dims) == 2}
    for node in model.graph.node:  # a table kept in another type, or as a Constant
        if node.op_type == "Constant" and len(node.attribute[0].t.dims) == 2:
            tables[node.output[0]] = node.attribute[0].t.dims[0]
        if node.op_type in ("Cast", "Identity", "DequantizeLinear") and node.input[0] in tables:
            tables[node.output[0]] = tables[node.input[0]]
    same = {ids}
    for node in model.graph.node:
        if node.op_type in _INDEX_ONLY and node.input[0] in same:
            same.add(node.output[0])
        looks_up = node.op_type in ("Gather", "GatherBlockQuantized") and node.input[1] in same
        if looks_up and node.input[0] in tables:
            return int(tables[node.input[0]])
    return 0


def _text_feed(inputs: list[_Input], ids: dict[str, NDArray[Any]]) -> Feed:
    """The ids with masks of ones, positions, token types of zero, and an empty past."""
    batch, length = next(iter(ids.values())).shape
    rng = np.random.default_rng(0)
    return {
        i.name: ids[i.name].astype(i.dtype)
        if i.name in ids
        else _filled(i, i.sized(batch, 0 if i.is_state else length), rng)
        for i in inputs
    }


def _random_ids(
    inputs: list[_Input],
    vocabularies: dict[str, int],
    batch: int,
    length: int,
    rng: np.random.Generator,
) -> dict[str, NDArray[Any]]:
    return {
        i.name: rng.integers(0, vocabularies[i.name], i.sized(batch, length))
        for i in inputs
        if i.name in vocabularies
    }


def _longest(
    session: ort.InferenceSession, inputs: list[_Input], vocabularies: dict[str, int]
) -> int:
    """The longest sequence, of those we would write, that the model has positions for."""
    for length in (_LENGTH, 48, 32, 16):
        ids = _random_ids(inputs, vocabularies, 1, length, np.random.default_rng(0))
        try:
            _run(session, _text_feed(inputs, ids))
        except OnnxqError:
            continue
        return length
    return 8


def _token_feeds(
    inputs: list[_Input],
    vocabularies: dict[str, int],
    n: int,
    longest: int,
    rng: np.random.Generator,
) -> list[Feed]:
    lengths = rng.integers(8, longest + 1, n)
    return [
        _text_feed(inputs, _random_ids(inputs, vocabularies, 1, int(length), rng))
        for length in lengths
    ]


def _logits(session: ort.InferenceSession, feed: Feed, vocabulary: int) -> NDArray[Any] | None:
    """The first output (batch, length, vocabulary)."""
    for y in _run(session, feed):
        if isinstance(y, np.ndarray) and y.ndim == 3 and y.shape[2] == vocabulary:
            return y
    return None


def _predicts_next(
    session: ort.InferenceSession, inputs: list[_Input], vocabularies: dict[str, int]
) -> bool:
    """Whether an output scores the next token: it has a column per token, and what it says early
    on does not hang on what comes later."""
    if len(vocabularies) != 1:
        return False
    ((name, vocabulary),) = vocabularies.items()
    ids = _random_ids(inputs, vocabularies, 1, 8, np.random.default_rng(0))
    if ids[name].ndim != 2:
        return False
    first = _logits(session, _text_feed(inputs, ids), vocabulary)
    if first is None:
        return False
    ids[name][:, -1] = (ids[name][:, -1] + 1) % vocabulary
    second = _logits(session, _text_feed(inputs, ids), vocabulary)
    return second is not None and np.allclose(first[:, :-1], second[:, :-1], rtol=1e-3, atol=1e-3)


def _affordable(model: onnx.ModelProto, n: int) -> int:
    """How many of n sequences to write."""
    weights = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
    return max(1, min(n, int(_TEXT_BUDGET / (weights * _LENGTH**2 / 2 + 1))))


def _written_feeds(
    session: ort.InferenceSession,
    inputs: list[_Input],
    vocabularies: dict[str, int],
    n: int,
    longest: int,
    rng: np.random.Generator,
) -> list[Feed]:
    """Sequences that the model writes, each after a random first token, at temperature 1."""
    ((name, vocabulary),) = vocabularies.items()
    ids = next(i for i in inputs if i.name == name)
    batch, length = ids.sized(n, longest)
    fixed = isinstance(ids.shape[1], int)
    rounds = -(-n // batch)
    written = []
    for _ in range(rounds):
        text = np.zeros((batch, length), np.int64)
        text[:, 0] = rng.integers(0, vocabulary, batch)
        for end in range(1, length):
            seen = text if fixed else text[:, :end]
            scores = _logits(session, _text_feed(inputs, {name: seen}), vocabulary)
            assert scores is not None  # _predicts_next saw them
            text[:, end] = _drawn(scores[:, end - 1 if scores.shape[1] > end else -1], rng)
        written.append(text)
    step = batch if isinstance(ids.shape[0], int) else 1
    text = np.concatenate(written)
    return [_text_feed(inputs, {name: text[k : k + step]}) for k in range(0, len(text), step)]


def _drawn(scores: NDArray[Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """One of the 40 likeliest tokens for each row of scores (batch, vocabulary)."""
    scores = scores.astype(np.float64)
    top = min(_TOP, scores.shape[1])
    least = np.partition(scores, -top, axis=1)[:, -top, None]
    noisy = np.where(scores >= least, scores + rng.gumbel(size=scores.shape), -np.inf)
    return np.asarray(noisy.argmax(axis=1))
