"""Images made of dead leaves: discs that hide each other, with radii r of density ∝ r⁻³, which have
the edges and the power spectrum of natural images (Lee, Mumford and Huang, "Occlusion Models for
Natural Images", 2001); some are striped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


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
