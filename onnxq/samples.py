"""Where samples come from: .npz files, folders of them or of images, functions, Python objects.

Whatever the source, samples are streamed: one feed (an array per model input) is in memory at a
time. Every feed is checked against the model's inputs before anyone sees it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxq.errors import OnnxqError
from onnxq.feeds import Batches, Feed, InputSpec, Source, as_array, checked, input_specs
from onnxq.images import Images, image_paths, open_images
from onnxq.iterables import Call, List, imported, probed, spooled
from onnxq.npz import Folder, InMemory, cut, npz_arrays
from onnxq.preprocess import SETTINGS, Preprocess

__all__ = ["Feed", "InputSpec", "Preprocessing", "Samples", "input_specs", "open_samples"]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_ACCEPTED = "give an .npz or .txt file, a folder of .npz files or of images, or module:function"

Preprocessing = str | Path | Mapping[str, Any] | Preprocess | None


class Samples:
    """Feeds for the model, one per inference; iterating again starts again.

    `len` is the number of feeds. It reads a function's samples through once where it must count.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[InputSpec],
        *,
        synthesised: bool = False,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.synthesised = synthesised
        self._source, self._specs = source, list(specs)
        self._start, self._stop = start, stop
        self._length: int | None = None
        self._digest: str | None = None

    @property
    def description(self) -> str:
        """For a report: `calib.npz, 40 samples`."""
        count = self._source.samples(self._start, self._start + len(self))
        return f"{self._source.name}, {count} sample{'' if count == 1 else 's'}{self._source.note}"

    def __len__(self) -> int:
        if self._length is None:
            self._length = max(0, self._source.count(self._stop) - self._start)
        return self._length

    def __iter__(self) -> Iterator[Feed]:
        for number, feed in enumerate(self._source.feeds(self._start, self._stop), self._start):
            yield checked(feed, self._specs, self._source, number)

    def where(self, number: int) -> str:
        """Names the sample of a feed of these, for a message."""
        return self._source.where(self._start + number)

    def from_start(self) -> tuple[Samples, int]:
        """These and all that their source has before them, and how many feeds those are."""
        whole = Samples(self._source, self._specs, synthesised=self.synthesised, stop=self._stop)
        return whole, self._start

    def samples(self, start: int, stop: int) -> int:
        """How many samples the feeds `start` to `stop` of these hold."""
        return self._source.samples(self._start + start, self._start + stop)

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def files(self) -> Sequence[Path]:
        """The file of each sample of the source, from its first on; none where they share one."""
        return self._source.paths if isinstance(self._source, Images | Folder) else ()

    @property
    def batch(self) -> int:
        """Samples that share a feed."""
        return self._source.batch if isinstance(self._source, Batches) else 1

    def slice(self, start: int, stop: int | None) -> Samples:
        """The feeds `start` to `stop` (exclusive; None: to the end) of these, still streaming.

        Raises ValueError for a negative bound.
        """
        if start < 0 or (stop is not None and stop < 0):
            raise ValueError("a slice of samples has bounds from 0 up")
        ends = [self._stop, None if stop is None else self._start + stop]
        end = min((e for e in ends if e is not None), default=None)
        return Samples(
            self._source,
            self._specs,
            synthesised=self.synthesised,
            start=self._start + start,
            stop=end,
        )

    def digest(self) -> str:
        """SHA-256 (hex) over the names, dtypes, shapes and bytes of all feeds, in order."""
        if self._digest is None:
            sha = hashlib.sha256()
            for feed in self:
                for name, array in sorted(feed.items()):
                    sha.update(repr((name, str(array.dtype), array.shape)).encode())
                    strings = array.dtype.kind == "O"  # whose bytes are addresses
                    sha.update(repr(array.tolist()).encode() if strings else array.tobytes())
            self._digest = sha.hexdigest()
        return self._digest

    def identity(self) -> str:
        """A hash that differs where a feed does; of the feeds' origin where that is quicker."""
        origin = self._source.origin(self._start, self._stop)
        return hashlib.sha256(origin.encode()).hexdigest() if origin else self.digest()


def open_samples(
    source: object,
    specs: Sequence[InputSpec],
    *,
    batch_size: int = 1,
    limit: int | None = None,
    name: str | None = None,
    synthesised: bool = False,
    preprocess: Preprocessing = None,
) -> Samples:
    """Open `source` as samples for a model with the inputs `specs`.

    source      one feed is
    .npz path   `batch_size` rows of every array. Arrays that are no input are ignored. An array
                with one dimension more than its input holds a whole feed in each row, an array of
                no dimensions is fed every time. A fixed first dimension of the model overrides
                `batch_size`; rows left over are then not fed.
    folder      one .npz file of it, as it is, in the order of the names; or `batch_size` of the
                images in it and in its subfolders, prepared as `preprocess` says
    'mod:func'  what the function yields; it is called anew for each iteration
    dict        as an .npz
    sequence, zero-argument callable, iterable: the dicts {input name: array} that it holds or
                yields. A one-shot iterator is first written to a temporary file.

    `limit` is the largest number of samples: rows of an .npz or dict, images, feeds elsewhere.
    The first ones are taken; of images those at even distances in the order of their paths.
    `name` names the source in descriptions and messages. `preprocess` is for a folder of images:
    its settings or their TOML file, instead of the `preprocess.toml` in the folder.

    Raises OnnxqError when the source cannot be read, is empty, or its first feed does not fit.
    """
    if batch_size < 1:
        raise OnnxqError(f"the batch size is {batch_size}; give 1 or more")
    if limit is not None and limit < 1:
        raise OnnxqError(f"the limit of samples is {limit}; give 1 or more")
    if isinstance(source, Samples):
        return source.slice(0, limit)
    opened = _open(source, list(specs), batch_size, limit, name, preprocess)
    if preprocess is not None and not isinstance(opened, Images):
        raise OnnxqError(f"preprocessing is for a folder of images, and {opened.name} is none")
    stop = None if isinstance(opened, Batches) else limit
    samples = Samples(opened, specs, synthesised=synthesised, stop=stop)
    if next(iter(samples), None) is None:
        raise OnnxqError(f"{opened.name} holds no samples; give at least one")
    return samples


def _open_folder(
    path: Path,
    specs: list[InputSpec],
    batch_size: int,
    limit: int | None,
    name: str | None,
    preprocess: Preprocessing,
) -> Source:
    """Of .npz files; of images where there are none, or where preprocessing speaks of images."""
    files = sorted(path.glob("*.npz"))
    settled = preprocess is not None or (path / SETTINGS).is_file()
    images = image_paths(path) if settled or not files else []
    if images:
        return open_images(path, images, specs, preprocess, batch_size, limit, name or path.name)
    if files:
        return Folder(name or path.name, files, specs)
    raise OnnxqError(f"folder {str(path)!r} holds no .npz file and no image; {_ACCEPTED}")


def _open(
    source: object,
    specs: list[InputSpec],
    batch_size: int,
    limit: int | None,
    name: str | None,
    preprocess: Preprocessing,
) -> Source:
    if isinstance(source, str | Path):
        path = Path(source)
        if isinstance(source, str) and not path.exists() and _FUNCTION.fullmatch(source):
            return probed(Call(name or str(source), imported(str(source))))
        if path.is_dir():
            return _open_folder(path, specs, batch_size, limit, name, preprocess)
        if not path.exists():
            raise OnnxqError(f"samples {str(path)!r} do not exist; {_ACCEPTED}")
        if path.suffix.lower() != ".npz":
            raise OnnxqError(f"{str(path)!r} is no .npz file; {_ACCEPTED}")
        return cut(name or path.name, npz_arrays(path), specs, batch_size, limit)
    if isinstance(source, Mapping):
        title = name or "arrays"
        arrays = {k: InMemory(as_array(value, k, title)) for k, value in source.items()}
        return cut(title, arrays, specs, batch_size, limit)
    if isinstance(source, Sequence):
        return List(name or "list", source)
    if callable(source):
        return probed(Call(name or str(getattr(source, "__name__", "function")), source))
    if isinstance(source, Iterator):
        return spooled(source, specs, limit, name or "iterator")
    if isinstance(source, Iterable):
        return probed(Call(name or type(source).__name__, lambda: source))
    raise OnnxqError(f"samples cannot come from a {type(source).__name__}; {_ACCEPTED}")
