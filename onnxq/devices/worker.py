"""Runs models on one execution provider. Needs nothing but onnxruntime and NumPy.

    python worker.py FOLDER

It stands alone so that any Python can run it: of another environment, another machine, another
kind of CPU. FOLDER holds `jobs.json`, a list of the names of folders, and each of these `job.json`
(see `onnxq.devices.place`). Each answer is written as soon as it is known, so that a provider that
takes the process down costs one answer.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

PLUGINS = {"QNNExecutionProvider": "onnxruntime_qnn"}  # packages beside onnxruntime's own


def main(folder: str) -> None:
    os.dup2(2, 1)  # what native libraries print is no answer
    import onnxruntime

    with open(os.path.join(folder, "jobs.json"), encoding="utf-8") as file:
        jobs = json.load(file)
    write(os.path.join(folder, "ready.json"), {"version": onnxruntime.__version__})
    for name in jobs:
        place = os.path.join(folder, name)
        with open(os.path.join(place, "job.json"), encoding="utf-8") as file:
            job = json.load(file)
        answer: dict[str, Any] = {
            "version": version(onnxruntime, job["provider"]),
            "machine": platform.machine(),
            "stage": "start",
        }
        try:
            work(onnxruntime, job, place, answer)
        except Exception as error:  # whatever a provider throws is its answer
            answer["error"] = " ".join(str(error).split()) or type(error).__name__
        write(os.path.join(place, "answer.json"), answer)


def work(ort: Any, job: dict[str, Any], place: str, answer: dict[str, Any]) -> None:
    import numpy

    options = session_options(ort, job, place)
    providers = add_provider(ort, options, job["provider"], job["options"])
    answer["stage"] = "load"
    begin = time.perf_counter()
    session = ort.InferenceSession(os.path.join(place, job["model"]), options, **providers)
    answer["load_ms"] = 1e3 * (time.perf_counter() - begin)
    answer["providers"] = session.get_providers()
    answer["placement"] = placement(session)
    answer["stage"] = "run"
    outputs = [value.name for value in session.get_outputs()]
    answer["outputs"] = outputs
    feed: dict[str, Any] = {}
    for number in range(job["samples"]):
        with numpy.load(os.path.join(place, f"sample-{number}.npz")) as arrays:
            feed = dict(arrays)
        made = session.run(outputs, feed)
        numpy.savez(os.path.join(place, f"output-{number}.npz"), *made)
    if job["profile"]:
        answer["kernels"] = kernels(session.end_profiling())
    if job["seconds"] and job["samples"]:
        runs = [(session, feed), *rivals(ort, job, place)]
        answer["latency_ms"], *answer["rivals_ms"] = latencies(runs, job["seconds"])
    answer["stage"] = ""


def version(ort: Any, provider: str) -> str:
    """Of onnxruntime, and of the provider's package where it has one of its own."""
    if provider not in PLUGINS:
        return str(ort.__version__)
    from importlib import metadata

    try:
        return f"{ort.__version__}, {PLUGINS[provider]} {metadata.version(PLUGINS[provider])}"
    except metadata.PackageNotFoundError:
        return str(ort.__version__)


def rivals(ort: Any, job: dict[str, Any], place: str) -> list[tuple[Any, dict[str, Any]]]:
    """Sessions of the models that are timed in turns with the job's, and what each is fed."""
    import numpy

    found = []
    for number, model in enumerate(job["rivals"]):
        options = session_options(ort, dict(job, optimized="", profile=False), place)
        providers = add_provider(ort, options, job["provider"], job["options"])
        session = ort.InferenceSession(os.path.join(place, model), options, **providers)
        with numpy.load(os.path.join(place, f"rival-{number}.npz")) as arrays:
            found.append((session, dict(arrays)))
    return found


def session_options(ort: Any, job: dict[str, Any], place: str) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for library in job["custom_ops"]:
        options.register_custom_ops_library(library)
    add_kernels(options, job["kernels"])
    options.intra_op_num_threads = job["threads"]
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        level.ORT_ENABLE_ALL if job["optimize"] else level.ORT_DISABLE_ALL
    )
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in job["config"].items():
        options.add_session_config_entry(key, value)
    if job["optimized"]:
        options.optimized_model_filepath = os.path.join(place, job["optimized"])
    if job["profile"]:
        options.enable_profiling = True
        options.profile_file_prefix = os.path.join(place, "profile")
    return options


def add_kernels(options: Any, kernels: dict[str, str]) -> None:
    """Those of `ai.onnxq` where they fit; elsewhere the functions in the model compute the same."""
    here = {"system": platform.system(), "machine": platform.machine()}
    if kernels and here == {key: kernels[key] for key in here}:
        with suppress(Exception):  # of an onnxruntime or a C library that is too old for them
            options.register_custom_ops_library(kernels["library"])


def add_provider(ort: Any, options: Any, provider: str, values: dict[str, str]) -> dict[str, Any]:
    """Make the session use the provider; what is left to say when it is made."""
    if provider in PLUGINS and find_spec(PLUGINS[provider]) is not None:
        package = __import__(PLUGINS[provider])
        if provider not in [device.ep_name for device in ort.get_ep_devices()]:
            ort.register_execution_provider_library(provider, package.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == provider]
        if not devices:
            raise RuntimeError(f"the package {PLUGINS[provider]} finds no device here")
        if provider == "QNNExecutionProvider" and "backend_path" not in values:
            values = dict(values, backend_path=package.get_qnn_htp_path())
        options.add_provider_for_devices(devices, values)
        return {}
    available = ort.get_available_providers()
    if provider not in available:
        raise RuntimeError(f"this onnxruntime has no {provider}; it has {', '.join(available)}")
    return {"providers": [(provider, values)]}


def placement(session: Any) -> dict[str, str]:
    """Which provider took each node, by name; nothing where this onnxruntime does not say."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    return {
        node.name: part.ep_name
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    }


def latencies(runs: list[tuple[Any, dict[str, Any]]], seconds: float) -> list[list[float]]:
    """Milliseconds of each run of each session: in turns, every other round the other way round.

    Five rounds at least, so that a machine that is busy with something else hits all alike.
    """
    for session, feed in runs:
        session.run(None, feed)
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < 5 or (len(rounds) < 200 and time.perf_counter() - begin < seconds):
        row = [0.0] * len(runs)
        order = range(len(runs))
        for k in order if len(rounds) % 2 else reversed(order):
            session, feed = runs[k]
            start = time.perf_counter()
            session.run(None, feed)
            row[k] = 1e3 * (time.perf_counter() - start)
        rounds.append(row)
    return [list(times) for times in zip(*rounds, strict=True)]


def kernels(path: str) -> list[list[Any]]:
    """[name, operator, provider, microseconds] of everything that ran, in order."""
    with open(path, encoding="utf-8") as file:
        events = json.load(file)
    return [
        [
            event["name"][: -len("_kernel_time")],
            args["op_name"],
            args.get("provider", ""),
            event["dur"],
        ]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        for args in [event["args"]]
    ]


def write(path: str, value: Any) -> None:
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(path + ".part", path)


if __name__ == "__main__":
    main(sys.argv[1])
