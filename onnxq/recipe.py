"""A recipe is a TOML list of passes and their fields; a preset is a recipe that ships."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from onnxq import toml
from onnxq.errors import OnnxqError, suggest
from onnxq.passes.lower.codebook_matmul import CodebookMatMul
from onnxq.passes.lower.fuse_integer import FuseInteger
from onnxq.passes.lower.insert_qdq import InsertQDQ
from onnxq.passes.lower.integer_only import IntegerOnly
from onnxq.passes.solve.assign import Assign
from onnxq.pipeline import Pass, Pipeline
from onnxq.target import Format, Target, load_target, target_names

ENTRY_POINTS = "onnxq.passes"


@dataclass(frozen=True)
class Recipe:
    """A named pipeline. `text` is the TOML that gives the same pipeline again.

    `optional` names the passes that are to be kept only where they make the result better.
    """

    name: str
    summary: str
    passes: tuple[Pass, ...]
    optional: frozenset[str] = frozenset()

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.passes)

    def without(self, name: str) -> Recipe:
        """The same without the passes of this name."""
        return replace(self, passes=tuple(step for step in self.passes if step.name != name))

    def in_blocks(self, bits: int | None, block_size: int | None) -> Recipe:
        """The same with weights of other bits, or in other blocks, for recipes of weights alone."""
        plans = [
            step for step in self.passes if isinstance(step, Assign) and step.form == "weights"
        ]
        if not plans:
            raise OnnxqError(
                f"--bits and --block-size are for presets of weights alone, such as int4; "
                f"{self.name!r} is not one"
            )

        def changed(step: Pass) -> Pass:
            if step not in plans:
                return step
            assert isinstance(step, Assign)
            now = Format.parse(step.format)
            format = replace(
                now, weight_bits=bits or now.weight_bits, block=block_size or now.block
            )
            return replace(step, format=str(format))

        return replace(self, passes=tuple(map(changed, self.passes)))

    def strict(self) -> Recipe:
        """The same, refusing a model in which an operator stays float, for recipes of integers."""
        if not any(isinstance(step, IntegerOnly) for step in self.passes):
            raise OnnxqError(
                f"--strict is for recipes that leave nothing float, such as integer-only; "
                f"{self.name!r} is not one"
            )
        steps = (replace(s, strict=True) if isinstance(s, IntegerOnly) else s for s in self.passes)
        return replace(self, passes=tuple(steps))

    def fused(self) -> Recipe:
        """The same, ending in the fast integer operators of the target's runtime."""
        if any(isinstance(step, FuseInteger) for step in self.passes):
            return self
        if not any(isinstance(step, InsertQDQ) for step in self.passes) or any(
            isinstance(step, Assign) and step.form == "weights" for step in self.passes
        ):
            raise OnnxqError(
                f"--fuse is for recipes of 8-bit weights and activations in QDQ form, such as "
                f"int8-static and int8-smooth; {self.name!r} is not one"
            )
        return replace(self, passes=(*self.passes, FuseInteger()))

    def require_operators(self) -> None:
        """Raises OnnxqError for a recipe of which nothing becomes an operator of onnxq's own."""
        if not any(isinstance(step, CodebookMatMul) for step in self.passes):
            raise OnnxqError(
                "--ops is for recipes of codebooks, lattices or 3 bits, such as nf4, int3 and "
                f"int2; {self.name!r} is not one"
            )

    @property
    def text(self) -> str:
        blocks = [f"summary = {toml.dump(self.summary)}"]
        for step in self.passes:
            changed = {k: v for k, v in step.settings().items() if v != _default(step, k)}
            rows = [f"{key} = {toml.dump(value)}" for key, value in changed.items()]
            rows += ["optional = true"] if step.name in self.optional else []
            blocks.append("\n".join(["[[pass]]", f'name = "{step.name}"', *rows]))
        return "\n\n".join(blocks) + "\n"


def load_recipe(name: str, settings: Sequence[str] = ()) -> Recipe:
    """A preset by name, or a recipe from a `.toml` file, with `pass.field=value` changes applied.

    Raises OnnxqError for an unknown preset, pass or field, and for a value of the wrong type.
    """
    if name.endswith(".toml"):
        return parse_recipe(Path(name).stem, toml.read_text(Path(name), "recipe"), settings)
    return parse_recipe(name, preset_text(name), settings)


def check_target(recipe: Recipe, target: Target) -> None:
    """Raises OnnxqError where the target has no rule for what the recipe wants, naming targets
    that have one, and presets that suit this one.
    """
    plans = [step for step in recipe.passes if isinstance(step, Assign)]
    unfit = next((plan for plan in plans if not _suits(plan, target)), None)
    if unfit is None:
        return
    targets = [name for name in target_names() if _suits(unfit, load_target(name))]
    presets = [
        name
        for name in preset_names()
        if all(_suits(s, target) for s in load_recipe(name).passes if isinstance(s, Assign))
    ]
    wanted = f"{unfit.format} ({unfit.form})"
    why = f": {target.lacks[unfit.form]}" if unfit.form in target.lacks else ""
    raise OnnxqError(
        f"target {target.name} has no rules for {wanted}, which {recipe.name!r} wants{why}; "
        f"targets that have: {', '.join(targets) or 'none'}; presets for {target.name}: "
        f"{', '.join(presets)}"
    )


def _suits(plan: Assign, target: Target) -> bool:
    try:
        plan.check(target)
    except OnnxqError:
        return False
    return True


def preset_names() -> list[str]:
    folder = resources.files("onnxq") / "presets"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """The TOML of a preset, to copy and edit."""
    if name not in preset_names():
        raise OnnxqError(f"there is no preset {name!r}{suggest(name, preset_names())}")
    return (resources.files("onnxq") / "presets" / f"{name}.toml").read_text("utf-8")


def parse_recipe(name: str, text: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe from TOML. Raises OnnxqError as `load_recipe` does."""
    where = f"recipe {name!r}"
    data = toml.parse(text, where)
    rows, summary = toml.tables(data, "pass", where), data.get("summary", "")
    if extra := sorted(set(data) - {"summary", "pass"}):
        raise OnnxqError(
            f"{where} has the unknown key {extra[0]!r}; see `onnxq presets show int8-static`"
        )
    if not rows:
        raise OnnxqError(f"{where} has no [[pass]] in it; see `onnxq presets show int8-static`")
    for setting in settings:
        _apply_setting(rows, setting)
    summary = toml.coerce(summary, str, f"{where}: summary")
    optional = frozenset(
        str(row.get("name"))
        for row in rows
        if toml.coerce(row.pop("optional", False), bool, f"{where}: optional")
    )
    known = pass_types()
    return Recipe(name, summary, tuple(_build(row, known) for row in rows), optional)


def pass_types() -> dict[str, metadata.EntryPoint]:
    """Every installed pass by name, not yet imported: ours and third parties' alike."""
    return {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINTS)}


def load_pass(name: str) -> type[Pass]:
    """The class of a pass. Raises OnnxqError when there is none of that name."""
    return _loaded(name, pass_types())


def _loaded(name: str, known: Mapping[str, metadata.EntryPoint]) -> type[Pass]:
    if name not in known:
        raise OnnxqError(f"there is no pass {name!r}{suggest(name, known)}")
    try:
        kind = known[name].load()
    except Exception as error:  # of a package that is not ours
        raise OnnxqError(
            f"the pass {name!r} of {known[name].value!r} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise OnnxqError(f"the entry point {name!r} is not an onnxq Pass")
    return kind


def _apply_setting(rows: list[dict[str, Any]], setting: str) -> None:
    """`pass.field=value`, for every pass of that name in the recipe."""
    key, equals, value = setting.partition("=")
    name, dot, field_name = key.rpartition(".")
    if not equals or not dot:
        raise OnnxqError(f"--set wants pass.field=value, not {setting!r}")
    matching = [row for row in rows if row.get("name") == name]
    if not matching:
        known = [str(row.get("name")) for row in rows]
        raise OnnxqError(f"the recipe has no pass {name!r}{suggest(name, known)}")
    if field_name == "name":
        raise OnnxqError(f"--set changes fields, and 'name' is none: {setting!r}")
    try:
        parsed = toml.parse(f"value = {value}", setting)["value"]
    except OnnxqError:
        parsed = value  # a bare word is a string
    for row in matching:
        row[field_name] = parsed


def _build(row: dict[str, Any], known: Mapping[str, metadata.EntryPoint]) -> Pass:
    name = row.pop("name", None)
    if not isinstance(name, str):
        raise OnnxqError("every [[pass]] of a recipe needs a name")
    kind = _loaded(name, known)
    try:
        return kind(**toml.fill(kind, row, f"{name}."))
    except (TypeError, ValueError) as error:  # a field without a default, or one it refuses
        raise OnnxqError(f"the pass {name!r}: {error}") from None


def _default(step: Pass, key: str) -> Any:
    return next(f.default for f in fields(step) if f.name == key)
