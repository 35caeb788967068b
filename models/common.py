"""What the three training scripts share: the training loop, a checked export and the samples."""

import ast
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
OPSET = 18

Tensors = Mapping[str, Tensor]


def make_reproducible(seed: int) -> None:
    """Fix the seed and use one thread: a second run on the same platform gives the same model."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def fit(
    model: nn.Module,
    batch_loss: Callable[[], Tensor],
    *,
    steps: int,
    peak_lr: float,
    weight_decay: float,
) -> None:
    """Minimise `batch_loss`, which draws a batch and returns its loss; leaves `model` in eval()."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps)
    started = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        loss = batch_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            elapsed = time.perf_counter() - started
            print(f"step {step:5d}/{steps}  loss {loss.item():.4f}  {elapsed:5.1f} s")
    model.eval()


def export(
    model: nn.Module,
    name: str,
    example: Tensors,
    outputs: Sequence[str],
    dynamic_shapes: tuple[Any, ...],
    probe: Tensors,
    *,
    keep_batchnorm: bool = False,
) -> None:
    """Write `name`.onnx next to this file and check that it computes what `model` computes.

    `example` is what the exporter traces and `dynamic_shapes` names the axes that may change, as
    in `torch.export`. `probe` has other sizes along them; the file must agree with `model` on it.
    The current exporter always folds a BatchNormalization into the convolution before it;
    `keep_batchnorm` takes the older one, which can leave it in place.
    """
    path = HERE / f"{name}.onnx"
    exporter: dict[str, Any]
    if keep_batchnorm:
        exporter = {
            "dynamo": False,
            "training": torch.onnx.TrainingMode.PRESERVE,
            "do_constant_folding": False,
            "dynamic_axes": dict(zip(example, dynamic_shapes, strict=True))
            | {output: {0: "batch"} for output in outputs},
        }
    else:
        exporter = {"dynamo": True, "dynamic_shapes": dynamic_shapes, "external_data": False}
    torch.onnx.export(
        model,
        tuple(example.values()),
        path,
        input_names=list(example),
        output_names=list(outputs),
        opset_version=OPSET,
        verbose=False,
        **exporter,
    )
    graph_model = onnx.load(path)
    graph_model.graph.name = name
    _name_after_modules(graph_model.graph)
    _drop_annotations(graph_model)
    onnx.checker.check_model(graph_model, full_check=True)
    onnx.save(graph_model, path)

    with torch.no_grad():
        expected = model(*probe.values())
    expected = (expected,) if isinstance(expected, Tensor) else expected
    for want, got in zip(expected, run(name, probe), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{path.name}: {parameters} parameters, {path.stat().st_size} bytes")


def run(name: str, inputs: Tensors) -> list[Tensor]:
    """The outputs of `name`.onnx, computed by onnxruntime on the CPU."""
    session = onnxruntime.InferenceSession(
        HERE / f"{name}.onnx", providers=["CPUExecutionProvider"]
    )
    outputs = session.run(None, {key: value.numpy() for key, value in inputs.items()})
    return [torch.from_numpy(output) for output in outputs]


def accuracy(name: str, inputs: Tensors, labels: Tensor) -> float:
    """The share of samples on which the largest output of `name`.onnx is at the label."""
    (logits,) = run(name, inputs)
    return (logits.argmax(-1) == labels).float().mean().item()


def save_samples(name: str, calib: Tensors, test: Tensors) -> None:
    """Write `name`.calib.npz and `name`.test.npz: one array per model input, samples first."""
    for split, tensors in {"calib": calib, "test": test}.items():
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        np.savez_compressed(HERE / f"{name}.{split}.npz", allow_pickle=False, **arrays)


def _name_after_modules(graph: onnx.GraphProto) -> None:
    """Name nodes and matrix weights after the torch module they come from.

    The current exporter numbers both, but notes the module in the node's metadata; it has a
    placeholder, which begins with an underscore, for nodes that are in no module.
    """
    used: Counter[str] = Counter()
    weights = {initializer.name: initializer for initializer in graph.initializer}
    renamed: dict[str, str] = {}
    for node in graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        if "pkg.torch.onnx.name_scopes" not in notes:
            continue
        *_, module, _operator = ast.literal_eval(notes["pkg.torch.onnx.name_scopes"])
        in_module = module and not module.startswith("_")
        name = f"{module}/{node.op_type}" if in_module else node.op_type
        node.name = f"{name}_{used[name]}" if used[name] else name
        used[name] += 1
        if node.op_type == "MatMul" and node.input[1] in weights:
            renamed[node.input[1]] = f"{module}.weight"
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    for old, new in renamed.items():
        weights[old].name = new


def _drop_annotations(model: onnx.ModelProto) -> None:
    """Remove what the exporters note for debugging, such as the source lines of each node."""
    graph = model.graph
    graph.ClearField("value_info")
    for annotated in [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output]:
        annotated.ClearField("doc_string")
        annotated.ClearField("metadata_props")
    for output in graph.output:
        for size in output.type.tensor_type.shape.dim:
            if "+" in size.dim_param:  # "past + length": the exporter's order varies
                size.dim_param = " + ".join(sorted(size.dim_param.split(" + ")))
