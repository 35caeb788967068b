"""Train `decoder_lm.onnx`, a small Llama-style language model, and its twin with a cache.

It predicts the next character of documentation text; a token is an ASCII code. `decoder_lm.onnx`
reads a whole sequence. `decoder_lm_kv.onnx` has the same weights and reads on from the keys and
values of earlier positions, which it takes and returns.

Data: the pages of the Python language reference in `pydoc_data.topics`, as installed with the
interpreter that runs this script (PSF-2.0); every twentieth paragraph is held out. Another Python
version has slightly other text, and so gives another model.
Reached: perplexity 2.88 per character on 40 held-out sequences of 64, with Python 3.11, in
about five minutes.
Run: python models/train_decoder.py
"""

from pydoc_data.topics import topics

import torch
from common import export, fit, make_reproducible, run, save_samples
from torch import Tensor, nn

NAME, NAME_KV = "decoder_lm", "decoder_lm_kv"
TYPOGRAPHY = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")
HELD_OUT_EVERY = 20
TEST_SAMPLES = CALIBRATION_SAMPLES = 40
SAMPLE_LENGTH = 64
CONTEXT = 128  # characters of a training sequence

VOCABULARY = 128
LAYERS, WIDTH, FEED_FORWARD_WIDTH = 4, 64, 192
QUERY_HEADS, KV_HEADS, HEAD_WIDTH = 4, 2, 16

Rotation = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Causal attention with rotary positions; each key and value head serves several queries."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, QUERY_HEADS * HEAD_WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD_WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD_WIDTH, bias=False)
        self.output = nn.Linear(QUERY_HEADS * HEAD_WIDTH, WIDTH, bias=False)

    def forward(
        self, x: Tensor, rotation: Rotation, bias: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query, key, value = (
            project(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        if past:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        groups = query.unflatten(1, (KV_HEADS, -1))
        scores = groups @ key.unsqueeze(2).transpose(-1, -2) * HEAD_WIDTH**-0.5
        mixed = (scores + bias).softmax(-1) @ value.unsqueeze(2)
        return self.output(mixed.flatten(1, 2).transpose(1, 2).flatten(2)), (key, value)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, FEED_FORWARD_WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, FEED_FORWARD_WIDTH, bias=False)
        self.down = nn.Linear(FEED_FORWARD_WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.attention = Attention()
        self.feed_forward_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.feed_forward = FeedForward()

    def forward(
        self, x: Tensor, rotation: Rotation, bias: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixed, present = self.attention(self.attention_norm(x), rotation, bias, past)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), present


class DecoderLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        frequencies = 10000.0 ** (-torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
        self.frequencies = nn.Buffer(frequencies, persistent=False)

    def forward(self, input_ids: Tensor, *past: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The logits and, when `past` is given, also the keys and values of all positions so far.

        `past` has those of the earlier positions: two tensors per layer, as in `cache_names`, of
        shape (batch, KV_HEADS, positions, HEAD_WIDTH), where `positions` may be 0.
        """
        start = past[0].size(2) if past else 0
        end = start + input_ids.size(1)
        positions = torch.arange(start, end).unsqueeze(1)
        angles = positions * self.frequencies
        rotation = angles.cos(), angles.sin()
        bias = (torch.arange(end) > positions).float() * -1e4

        x = self.embedding(input_ids)
        present: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            x, added = block(x, rotation, bias, past[2 * layer : 2 * layer + 2])
            present += added
        logits: Tensor = self.head(self.norm(x))
        return (logits, *present) if past else logits


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (x[i], x[i + half]) by the angle of its position."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def load_text() -> tuple[Tensor, Tensor]:
    """The character codes of the test and of the training text, of different paragraphs."""
    paragraphs = {
        " ".join(paragraph.split()): paragraph
        for topic in topics.values()
        for paragraph in topic.translate(TYPOGRAPHY).split("\n\n")
        if paragraph.isascii()
    }
    distinct = list(paragraphs.values())
    test = distinct[::HELD_OUT_EVERY]
    del distinct[::HELD_OUT_EVERY]
    return as_ids("\n\n".join(test)), as_ids("\n\n".join(distinct))


def as_ids(text: str) -> Tensor:
    return torch.tensor(list(text.encode("ascii")))


def spread(ids: Tensor, samples: int) -> Tensor:
    """`samples` stretches of SAMPLE_LENGTH characters at even distances."""
    starts = torch.linspace(0, len(ids) - SAMPLE_LENGTH, samples).long()
    return torch.stack([ids[start : start + SAMPLE_LENGTH] for start in starts])


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean cross entropy of each character given those before it."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def cache_names(kind: str) -> list[str]:
    return [f"{kind}.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]


def cache_inputs(input_ids: Tensor, past: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": input_ids, **dict(zip(cache_names("past_key_values"), past, strict=True))}


def check_cache(ids: Tensor) -> None:
    """Feeding `ids` in pieces, from an empty cache on, must give the logits of the whole."""
    (whole,) = run(NAME, {"input_ids": ids})
    past = [torch.zeros(len(ids), KV_HEADS, 0, HEAD_WIDTH)] * (2 * LAYERS)
    pieces = []
    for piece in ids.split([20, 1, 1, ids.size(1) - 22], dim=1):
        logits, *past = run(NAME_KV, cache_inputs(piece, past))
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-4)


def main() -> None:
    make_reproducible(seed=0)
    test, train = load_text()
    print(f"{len(train)} characters to train on, {len(test)} held out")
    model = DecoderLM()

    def batch_loss() -> Tensor:
        starts = torch.randint(len(train) - CONTEXT, (32, 1))
        ids = train[starts + torch.arange(CONTEXT)]
        return loss_of(model(ids), ids)

    fit(model, batch_loss, steps=2000, peak_lr=5e-3, weight_decay=0.1)

    test_ids, calib_ids = spread(test, TEST_SAMPLES), spread(train, CALIBRATION_SAMPLES)
    export(
        model,
        NAME,
        example={"input_ids": calib_ids[:2]},
        outputs=["logits"],
        dynamic_shapes=({0: "batch", 1: "length"},),
        probe={"input_ids": calib_ids[:3, :50]},
    )
    past = [torch.randn(2, KV_HEADS, 5, HEAD_WIDTH) for _ in range(2 * LAYERS)]
    export(
        model,
        NAME_KV,
        example=cache_inputs(calib_ids[:2, :7], past),
        outputs=["logits", *cache_names("present")],
        dynamic_shapes=({0: "batch", 1: "length"}, ({0: "batch", 2: "past"},) * len(past)),
        probe=cache_inputs(calib_ids[:2, :1], past),
    )
    check_cache(test_ids)
    (logits,) = run(NAME, {"input_ids": test_ids})
    print(f"test perplexity {loss_of(logits, test_ids).exp().item():.3f} per character")
    save_samples(NAME, calib={"input_ids": calib_ids}, test={"input_ids": test_ids})


if __name__ == "__main__":
    main()
