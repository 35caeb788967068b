"""A folder of images as samples, prepared as `preprocess.py` says.

An image is turned as its EXIF orientation says; transparency is dropped, a palette is looked up and
16 bits become 8. Only one batch of images is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError, one_line
from onnxq.feeds import Batches, Feed, InputSpec
from onnxq.preprocess import SETTINGS, Color, Layout, Preprocess, Size
from onnxq.storage import file_hash

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class _Frame:
    """How pixels become what the model takes: everything settled, nothing left to default."""

    spec: InputSpec
    resize: int | Size | None
    crop: Size | None
    scale: float
    mean: NDArray[np.float64]  # (channels,) or (1,)
    std: NDArray[np.float64]
    color: Color
    layout: Layout
    settings: str  # where they stand, for messages

    @property
    def size(self) -> tuple[int | None, int | None]:
        """The height and width that the model fixes."""
        height, width = _sides(self.spec, self.layout)
        return height, width

    def read(self, path: Path) -> NDArray[Any]:
        """One image (channels, height, width) or (height, width, channels), in the input's dtype.

        Raises OnnxqError, which names the file, for one that cannot be decoded or does not fit.
        """
        pixels = self._pixels(path)
        if self.color == "BGR":
            pixels = pixels[..., ::-1]
        if self.spec.dtype.kind != "f":
            values = pixels
        else:
            values = ((pixels * self.scale - self.mean) / self.std).astype(self.spec.dtype)
        return values.transpose(2, 0, 1) if self.layout == "NCHW" else values

    def _pixels(self, path: Path) -> NDArray[np.uint8]:
        """(height, width, channels)"""
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(path) as file:
                image = _converted(ImageOps.exif_transpose(file), self.color)
        except Exception as error:  # Pillow's plugins raise much else than OSError
            reason = "what it holds is no image that Pillow reads"
            if not isinstance(error, UnidentifiedImageError):
                reason = one_line(error) or type(error).__name__
            raise OnnxqError(
                f"cannot decode {str(path)!r}: {reason}; mend or remove the file"
            ) from None
        if self.resize is not None:
            height, width = _resized((image.height, image.width), self.resize)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if self.crop is not None:
            height, width = self.crop
            if image.height < height or image.width < width:
                raise OnnxqError(
                    f"{str(path)!r} is {image.height}×{image.width} pixels (height × width) before "
                    f"the crop to {height}×{width}; set resize in {self.settings}"
                )
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        if any(
            want not in (None, got) for want, got in zip(self.size, image.size[::-1], strict=True)
        ):
            taken = "×".join("?" if n is None else str(n) for n in self.size)
            raise OnnxqError(
                f"{str(path)!r} is {image.height}×{image.width} pixels (height × width) and the "
                f"model takes {taken}; set {_advice(self.spec, self.layout)} in {self.settings}"
            )
        return np.asarray(image, np.uint8).reshape(image.height, image.width, -1)


def _converted(image: Any, color: Color) -> Any:
    """The image as 8-bit RGB or greyscale; transparency is dropped."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if color == "L" else "RGB")


def _resized(size: Size, to: int | Size) -> Size:
    """The longer side is rounded down, as torchvision does."""
    if not isinstance(to, int):
        return to
    height, width = size
    if height <= width:
        return to, int(to * width / height)
    return int(to * height / width), to


def _sides(spec: InputSpec, layout: Layout) -> tuple[int | None, int | None]:
    assert spec.shape is not None
    start = 2 if layout == "NCHW" else 1
    height, width = (n if isinstance(n, int) else None for n in spec.shape[start : start + 2])
    return height, width


def _advice(spec: InputSpec, layout: Layout) -> str:
    """Settings that bring an image to the model's size."""
    height, width = _sides(spec, layout)
    if height != width or height is None:
        return f"resize = [{height or 224}, {width or 224}]"
    return f"resize = {round(height / 0.875)} and crop = {height}"


@dataclass
class Images(Batches):
    paths: list[Path]
    frame: _Frame

    def where(self, feed: int, row: int = 0) -> str:
        return str(self.paths[feed * self.batch + row])

    def origin(self, start: int, stop: int | None) -> str:
        used = self.paths[start * self.batch : self.count(stop) * self.batch]
        return repr((self.frame, self.batch, [file_hash(path) for path in used]))

    def feeds(self, start: int, stop: int | None) -> Iterator[Feed]:
        for number in range(start, self.count(stop)):
            first = number * self.batch
            paths = self.paths[first : min(first + self.batch, self.rows)]
            yield {self.frame.spec.name: self._stacked(paths)}

    def _stacked(self, paths: list[Path]) -> NDArray[Any]:
        images = [self.frame.read(path) for path in paths]
        for image, path in zip(images, paths, strict=True):
            if image.shape != images[0].shape:
                raise OnnxqError(
                    f"{str(paths[0])!r} and {str(path)!r} differ in size and cannot share a batch; "
                    f"set resize or crop in {self.frame.settings}, or feed one image at a time "
                    "(--batch-size 1)"
                )
        return np.stack(images)


def image_paths(folder: Path) -> list[Path]:
    """The images in a folder and in its subfolders, in the order of their paths."""
    found = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    shown = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return [folder / path for path in sorted(shown, key=lambda path: path.parts)]


def open_images(
    folder: Path,
    paths: list[Path],
    specs: Sequence[InputSpec],
    preprocess: str | Path | Mapping[str, Any] | Preprocess | None,
    batch_size: int,
    limit: int | None,
    name: str,
) -> Images:
    """The images `paths` of `folder` as feeds; of more than `limit` those at even distances, since
    folders are often in the order of the classes.

    `preprocess` is the settings or their file; None reads `preprocess.toml` in the folder.
    The model's batch, where it is fixed, overrides `batch_size`; images left over are not fed.
    Raises OnnxqError for a model without exactly one image input and for settings that do not fit.
    """
    spec, layouts = _image_input(folder, specs)
    try:
        import PIL  # noqa: F401 (an extra; what is missing is said before any work)
    except ImportError:
        raise OnnxqError(
            "images are read with Pillow, which is not installed: pip install 'onnxq[images]'"
        ) from None
    beside = folder / SETTINGS
    if preprocess is None and not beside.is_file():
        raise OnnxqError(_unsettled(folder, spec, layouts))
    source = beside if preprocess is None else preprocess
    if isinstance(source, Preprocess):
        where, settings = "preprocess", source
    elif isinstance(source, Mapping):
        where, settings = "preprocess", Preprocess.of(source)
    else:
        where, settings = str(source), Preprocess.read(Path(source))
    frame = _frame(spec, layouts, settings, where)
    assert spec.shape is not None
    batch, rows = batch_size, len(paths) if limit is None else min(limit, len(paths))
    paths = [paths[k * len(paths) // rows] for k in range(rows)]
    if isinstance(spec.shape[0], int):
        batch = spec.shape[0]
        rows -= rows % batch
        if not rows:
            raise OnnxqError(
                f"{name} holds fewer images than the {batch} that the model takes at a time; "
                "give more"
            )
    return Images(name, batch, rows, paths, frame)


def _image_input(folder: Path, specs: Sequence[InputSpec]) -> tuple[InputSpec, list[Layout]]:
    """The model's image input and the layouts that its shape allows."""
    fed = [spec for spec in specs if not spec.optional]
    if len(fed) == 1 and fed[0].shape is not None and len(fed[0].shape) == 4:
        spec = fed[0]
        assert spec.shape is not None
        fits: list[Layout] = []
        if spec.shape[1] in (1, 3) or not isinstance(spec.shape[1], int):
            fits.append("NCHW")
        if spec.shape[3] in (1, 3) or not isinstance(spec.shape[3], int):
            fits.append("NHWC")
        sure: list[Layout] = [
            layout for layout in fits if isinstance(spec.shape[1 if layout == "NCHW" else 3], int)
        ]
        pixels = spec.dtype.kind == "f" or spec.dtype == np.uint8
        if fits and pixels and spec.shape[0] != 0:
            return spec, sure[:1] or fits
    raise OnnxqError(
        f"the images in {str(folder)!r} can feed only a model whose one input is float or uint8, "
        f"with 1 or 3 channels and 4 dimensions; this one takes {', '.join(map(str, fed))}: give "
        "an .npz file, a folder of .npz files, or module:function"
    )


def _unsettled(folder: Path, spec: InputSpec, layouts: list[Layout]) -> str:
    size = _advice(spec, layouts[0]).replace(" and ", "; ")
    mean, std = "[0.485, 0.456, 0.406]", "[0.229, 0.224, 0.225]"
    if _channels(spec, layouts[0]) == 1:
        mean, std = "0.5", "0.5"
    values = f"; mean = {mean}; std = {std}" if spec.dtype.kind == "f" else ""
    return (
        f"{str(folder)!r} holds images and no {SETTINGS}; write there how the model's training "
        f"prepared them, a setting per line, such as: {size}{values}"
    )


def _channels(spec: InputSpec, layout: Layout) -> int | None:
    assert spec.shape is not None
    channels = spec.shape[1 if layout == "NCHW" else 3]
    return channels if isinstance(channels, int) else None


def _frame(spec: InputSpec, layouts: list[Layout], given: Preprocess, where: str) -> _Frame:
    layout = given.layout or layouts[0]
    if given.layout is None and len(layouts) > 1:
        raise OnnxqError(
            f"{where}: the model's input {spec} leaves its layout open; set layout to "
            '"NCHW" or "NHWC"'
        )
    if layout not in layouts:
        raise OnnxqError(
            f'{where}: layout is "{layout}" and the model\'s input {spec} is {layouts[0]}; remove '
            "the setting"
        )
    channels = _channels(spec, layout)
    color = given.color or ("L" if channels == 1 else "RGB")
    made = 1 if color == "L" else 3
    if channels not in (None, made):
        raise OnnxqError(
            f'{where}: color is "{color}", {made} channel{"s" * (made > 1)}, and the model\'s '
            f"input {spec} has {channels}; remove the setting"
        )
    if spec.dtype == np.uint8 and (given.mean or given.std or given.scale not in (None, 1)):
        raise OnnxqError(
            f"{where}: the model's input {spec} takes the pixels as they are; remove scale, mean "
            "and std"
        )
    for key, values in (("mean", given.mean), ("std", given.std)):
        if values is not None and len(values) not in (1, made):
            raise OnnxqError(
                f"{where}: {key} has {len(values)} numbers and the images have {made} "
                f"channel{'s' * (made > 1)}; give one for each"
            )
    crop = (given.crop, given.crop) if isinstance(given.crop, int) else given.crop
    return _Frame(
        spec,
        given.resize,
        crop,
        1 / 255 if given.scale is None else given.scale,
        np.array(given.mean or (0.0,)),
        np.array(given.std or (1.0,)),
        color,
        layout,
        where,
    )
