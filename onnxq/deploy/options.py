"""Session options of a deployed model, once, and as the code of each language."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class SessionOptions:
    """`config` are the runtime's session config entries, `options` the provider's own.

    `threads` is how many compute one operator; 0 leaves it to the runtime. `custom_ops` are the
    libraries in the folder.
    """

    provider: str
    options: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0
    config: Mapping[str, str] = field(default_factory=dict)
    custom_ops: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps({"graph_optimization_level": "all"} | asdict(self), indent=2) + "\n"

    def code(self, language: str) -> str:
        """The lines that set `config` and load `custom_ops`, with the indentation they have."""
        entry, library = _LANGUAGES[language]
        lines = [entry(json.dumps(key), json.dumps(value)) for key, value in self.config.items()]
        return "\n".join(lines + [library(json.dumps(name)) for name in self.custom_ops])


_LANGUAGES: dict[str, tuple[Callable[[str, str], str], Callable[[str], str]]] = {
    "py": (
        lambda key, value: f"    options.add_session_config_entry({key}, {value})",
        lambda file: f"    options.register_custom_ops_library(str(HERE / {file}))",
    ),
    "cpp": (
        lambda key, value: f"  options.AddConfigEntry({key}, {value});",
        lambda file: f"  options.RegisterCustomOpsLibrary({file});",
    ),
    "kt": (
        lambda key, value: f"        options.addConfigEntry({key}, {value})",
        lambda file: f"        options.registerCustomOpLibrary({file}) // built for the phone",
    ),
    "swift": (
        lambda key, value: f"        try options.addConfigEntry(withKey: {key}, value: {value})",
        lambda _: '        try options.registerCustomOps(usingFunction: "RegisterCustomOps")',
    ),
}
