"""How a function of the domain `ai.onnxq` is written: ONNX's own text, and what it means."""

from __future__ import annotations

from inspect import cleandoc

import onnx

DOMAIN = "ai.onnxq"
VERSION = 1
OPSET = 21  # of the standard operators in the bodies

UINT64 = onnx.TensorProto.UINT64
INT64 = onnx.TensorProto.INT64


def function(meaning: str, text: str) -> onnx.FunctionProto:
    """The function that `text` defines, `Name <attributes> (inputs) => (outputs) { nodes }`.

    `meaning` goes into the model as its description: equation, types and domain.
    """
    header = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}, "{DOMAIN}": {VERSION}]>'
    made = onnx.parser.parse_function(f"{header}\n{text}")
    made.doc_string = cleandoc(meaning)
    return made
