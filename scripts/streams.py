"""Audio models fed a call at a time, with the state of the call before."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.runtime import Session

Array = NDArray[Any]
Feed = dict[str, Array]
RATE = 16000
VAD_NEW, VAD_CONTEXT = 512, 64  # samples of a call: new ones, and old ones before them
WINDOW, HOP = 512, 256
HANN = np.sqrt(np.hanning(WINDOW + 1)[:WINDOW])  # periodic: analysis × synthesis adds up to 1


def read_wav(path: Path) -> Array:
    """16-bit mono samples, (n,) float32 in [-1, 1)."""
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def speech(model: Path, audio: Array) -> tuple[Array, list[Feed]]:
    """Silero: the probability of speech in each call, and what was fed to each."""
    session = Session(model)
    state, padded = np.zeros((2, 1, 128), np.float32), np.pad(audio, (VAD_CONTEXT, 0))
    feeds, probabilities = [], []
    for start in range(0, len(audio) - VAD_NEW + 1, VAD_NEW):
        heard = padded[start : start + VAD_CONTEXT + VAD_NEW]
        feed: Feed = {"input": heard[None], "state": state, "sr": np.array(RATE, np.int64)}
        said = session.run(feed)
        state = said["stateN"]
        feeds.append(feed)
        probabilities.append(said["output"].item())
    return np.array(probabilities, np.float32), feeds


def enhanced(model: Path, audio: Array) -> tuple[Array, list[Feed]]:
    """GTCRN: the signal it makes of `audio` by STFT and overlap-add, and what was fed to it."""
    session = Session(model)
    caches = {
        value.name: np.zeros(value.shape, np.float32)
        for value in session.ort.get_inputs()
        if value.name != "mix"
    }
    signal, feeds = np.zeros(len(audio)), []
    for start in range(0, len(audio) - WINDOW + 1, HOP):
        frame = slice(start, start + WINDOW)
        spectrum = np.fft.rfft(audio[frame] * HANN)
        mix = np.stack([spectrum.real, spectrum.imag], -1)[None, :, None]  # (1, 257, 1, 2)
        feed: Feed = {"mix": mix.astype(np.float32), **caches}
        said = session.run(feed)
        caches = {name: said[f"{name}_out"] for name in caches}
        signal[frame] += np.fft.irfft(said["enh"][0, :, 0] @ [1, 1j]) * HANN
        feeds.append(feed)
    return signal, feeds


def si_sdr(reference: Array, estimate: Array) -> float:
    """Scale-invariant signal-to-distortion ratio, dB."""
    target = (reference @ estimate) / (reference @ reference) * reference
    error = estimate - target
    return float(10 * np.log10((target @ target) / (error @ error)))
