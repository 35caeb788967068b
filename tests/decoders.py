"""Small language models in the shapes that exporters give them: tokens, mask, past and present."""

from __future__ import annotations

import numpy as np
import onnx
from graphs import model, normal

WIDTH, POSITIONS = 16, 64
PAST = "past_key_values.0"


def decoder(
    vocabulary: int = 24, past: bool = True, crossed: bool = False, seed: int = 0
) -> onnx.ModelProto:
    """One layer of causal attention and a feed-forward one; `crossed` adds what an encoder said.

    Inputs are input_ids, attention_mask (over past and new tokens), position_ids and, as wanted,
    past_key_values.0.key/.value and encoder_hidden_states; outputs logits and present.0.key/.value.
    """
    inputs = ["int64[batch,seq] input_ids", "int64[batch,total] attention_mask"]
    inputs += ["int64[batch,seq] position_ids"]
    inputs += [f"float[batch,1,past,{WIDTH}] past_{x}" for x in "kv" if past]
    inputs += [f"float[batch,enc,{WIDTH}] encoder_hidden_states"] if crossed else []
    outputs = [f"float[batch,seq,{vocabulary}] logits"]
    outputs += [f"float[batch,1,all,{WIDTH}] present_{x}" for x in "kv"]
    join = "Concat <axis = 2> (past_{0}, new_{0})" if past else "Identity (new_{0})"
    cross = """
        eq = MatMul (h1, weq)
        et = Transpose <perm = [0, 2, 1]> (encoder_hidden_states)
        es = MatMul (eq, et)
        ep = Softmax (es)
        ey = MatMul (ep, encoder_hidden_states)
        h = Add (h1, ey)"""
    text = f"""({", ".join(inputs)}) => ({", ".join(outputs)}) {{
        words = Gather (embedding, input_ids)
        places = Gather (positions, position_ids)
        x = Add (words, places)
        q3 = MatMul (x, wq)
        k3 = MatMul (x, wk)
        v3 = MatMul (x, wv)
        q = Unsqueeze (q3, one)
        new_k = Unsqueeze (k3, one)
        new_v = Unsqueeze (v3, one)
        present_k = {join.format("k")}
        present_v = {join.format("v")}
        kt = Transpose <perm = [0, 1, 3, 2]> (present_k)
        raw = MatMul (q, kt)
        shape = Shape (raw)
        rows = Gather (shape, two0)
        columns = Gather (shape, three0)
        first = Sub (columns, rows)
        row = Range (first, columns, one0)
        column = Range (zero0, columns, one0)
        row2 = Unsqueeze (row, one)
        earlier = LessOrEqual (column, row2)
        mask4 = Unsqueeze (attention_mask, onetwo)
        shown = Cast <to = 9> (mask4)
        visible = And (earlier, shown)
        scores = Where (visible, raw, low)
        p = Softmax (scores)
        y4 = MatMul (p, present_v)
        y = Squeeze (y4, one)
        h1 = Add (x, y){cross if crossed else ""}
        up = MatMul ({"h" if crossed else "h1"}, wup)
        active = Relu (up)
        down = MatMul (active, wdown)
        z = Add ({"h" if crossed else "h1"}, down)
        logits = MatMul (z, head)
    }}"""
    scale = WIDTH**-0.5
    weights = {
        "embedding": normal(vocabulary, WIDTH, seed=seed),
        "positions": normal(POSITIONS, WIDTH, seed=seed + 1, scale=0.3),
        "wup": normal(WIDTH, 2 * WIDTH, seed=seed + 5, scale=scale),
        "wdown": normal(2 * WIDTH, WIDTH, seed=seed + 6, scale=scale),
        "head": normal(WIDTH, vocabulary, seed=seed + 7, scale=2 * scale),
        "one": np.array([1]), "onetwo": np.array([1, 2]), "zero0": np.array(0),
        "one0": np.array(1), "two0": np.array(2), "three0": np.array(3),
        "low": np.array(-1e4, np.float32),
    }  # fmt: skip
    for n, name in enumerate(("wq", "wk", "wv", "weq") if crossed else ("wq", "wk", "wv")):
        weights[name] = normal(WIDTH, WIDTH, seed=seed + 10 + n, scale=scale)
    names = {
        f"{short}_{letter}": f"{long}.0.{word}"
        for short, long in (("past", "past_key_values"), ("present", "present"))
        for letter, word in (("k", "key"), ("v", "value"))
    }
    return renamed(model(text, opset=17, **weights), names)


def encoder(vocabulary: int = 24, seed: int = 50) -> onnx.ModelProto:
    """input_ids, attention_mask → last_hidden_state."""
    text = f"""(int64[batch,seq] input_ids, int64[batch,seq] attention_mask)
               => (float[batch,seq,{WIDTH}] last_hidden_state) {{
        words = Gather (embedding, input_ids)
        mask = Cast <to = 1> (attention_mask)
        mask3 = Unsqueeze (mask, two)
        seen = Mul (words, mask3)
        up = MatMul (seen, w1)
        active = Relu (up)
        last_hidden_state = MatMul (active, w2)
    }}"""
    weights = {
        "embedding": normal(vocabulary, WIDTH, seed=seed),
        "w1": normal(WIDTH, 2 * WIDTH, seed=seed + 1, scale=0.25),
        "w2": normal(2 * WIDTH, WIDTH, seed=seed + 2, scale=0.25),
        "two": np.array([2]),
    }
    return model(text, opset=17, **weights)


def renamed(made: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    """Tensors by other names: the text form takes no dots."""
    graph = made.graph
    for node in graph.node:
        for row in (node.input, node.output):
            row[:] = [names.get(name, name) for name in row]
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    onnx.checker.check_model(made)
    return made
