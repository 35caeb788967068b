"""How many channels a convolution of codes takes at once: what `pad-channels` pads to."""

from __future__ import annotations

from collections.abc import Mapping

from onnxq.devices.calls import Call, Weight
from onnxq.devices.place import Job, Place, ask
from onnxq.devices.single import OPSET, make_single
from onnxq.probing.forms import Form, coded_form
from onnxq.probing.measure import typical
from onnxq.qtype import QType
from onnxq.target import OpRule

WORTH = 0.9  # of the time without padding
_RULE = OpRule(
    "static", "", QType.parse("u8a"), QType.parse("s8:channel"), constant_weight=True
)  # fmt: skip


def at_once(place: Place, threads: int | None = None) -> tuple[int, int]:
    """(dense, depthwise): the channels of zeros that make it fastest, 1 where none do.

    A dense 3×3 of 3 input channels against 4 and 8; a depthwise one of 24 against 32 (16 at once)
    and of 20 against 24 (8 at once), each in turns at the place.
    """
    dense = {1: _dense(3), 4: _dense(4), 8: _dense(8)}
    sixteen = {1: _depthwise(24), 16: _depthwise(32)}
    eight = {1: _depthwise(20), 8: _depthwise(24)}
    found = [_fastest(place, forms, threads) for forms in (dense, sixteen, eight)]
    return found[0], max(found[1:])


def _fastest(place: Place, forms: Mapping[int, Form], threads: int | None) -> int:
    first, *others = forms.values()
    rivals = [(form.model, form.feed) for form in others]
    job = Job(first.model, (first.feed,), threads=threads, seconds=0.5, rivals=rivals)
    answer = ask(place, [job])[0]
    if answer.error:
        return 1
    times = [typical(t) for t in (answer.latencies_ms, *answer.rivals_ms)]
    ratios = {n: t / times[0] for n, t in zip(forms, times, strict=True)}
    best = min(ratios, key=lambda n: ratios[n])
    return best if ratios[best] < WORTH else 1


def _dense(channels: int) -> Form:
    return _form(Call(((1, channels, 96, 96), Weight((16, channels, 3, 3)), Weight((16,)))))


def _depthwise(channels: int) -> Form:
    weight = Weight((channels, 1, 3, 3))
    return _form(Call(((1, channels, 56, 56), weight, Weight((channels,))), {"group": channels}))


def _form(call: Call) -> Form:
    single = make_single("Conv", call, "float32", OPSET)
    assert single is not None
    return coded_form(single, _RULE)
