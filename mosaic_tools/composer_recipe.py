# SPDX-License-Identifier: Apache-2.0
"""Recipes of mosaicml/examples (examples/benchmarks/bert/yamls, at daddaeff7a), written for
MosaicML's Composer, as ones of ours.

Such a file is known by its structure: ours are flat, and it has a group of keys under `model`,
`optimizer`, `scheduler`, `train_loader`, `tasks` or, written for a platform, `parameters`. What
becomes of each of its keys is in the tables of composer_keys.py. What has no meaning here is
listed. What would change the result and cannot be had is refused, as is what is in no table.
"""

import difflib
import re
import shlex
from dataclasses import dataclass, field

import yaml

from mosaic_tools.composer_keys import KINDS, MAY_BE_NULL, Kind
from mosaic_tools.composer_rules import NOTHING, File

GROUPS = ("parameters", "model", "optimizer", "scheduler", "train_loader", "tasks")


def is_composers(recipe: dict) -> bool:
    return any(isinstance(recipe.get(name), dict) for name in GROUPS)


@dataclass
class Translation:
    """What a file says in our words.

    Args:
        values: by the names of our flags.
        nothing: keys that have no meaning here.
        remarks: on keys that mean something else here than there.
    """

    values: dict = field(default_factory=dict)
    nothing: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def lines(self, path: str) -> list[str]:
        """What is said of it."""
        nothing = ", ".join(self.nothing)
        said = [f"has no meaning here: {nothing}"] if nothing else []
        return [f"{path}: {line}" for line in said + self.remarks]


def translate(path: str, recipe: dict, known: set[str], given: dict) -> Translation:
    """Our recipe for one of Composer's.

    Args:
        recipe: as its YAML file has it, `${...}` included.
        known: names of the command's flags.
        given: values of flags that come after the file, by name.

    Raises:
        ValueError: a key or value cannot be honoured, and no flag stands in for it; it is a recipe
            of another command.
    """
    try:
        recipe, platform = unwrap(recipe)
        recipe, used = interpolate(recipe)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None
    kind = next(kind for kind in KINDS if kind.is_kind_of(recipe))
    if kind.flag not in known:
        raise ValueError(f"{path} is a recipe of {kind.script}: {kind.command} takes it")
    keys = dict(flat(recipe, kind.table))
    if unknown := [key for key in keys if key not in kind.table and key not in used]:
        near = difflib.get_close_matches(unknown[0], kind.table, n=2, cutoff=0.5)
        hint = f"; near are {' and '.join(near)}" if near else ""
        raise ValueError(
            f"{path}: unknown key {unknown[0]!r}{hint}: leave it out if it changes no result"
        )
    keys = {key: x for key, x in keys.items() if key in kind.table}
    file = File({k: x for k, x in keys.items() if x is not None}, given, platform.remarks)
    if unset := [key for key in keys if key not in file.keys and not may_be_null(key, kind, given)]:
        file.remark(f"without a value, so our defaults hold: {', '.join(unset)}")
    found = Translation(kind.silent(file), platform.nothing, file.remarks)
    for key, value in file.keys.items():
        rules = kind.table[key]
        for rule in rules if isinstance(rules, tuple) else (rules,):
            try:
                ours = {rule: value} if isinstance(rule, str) else rule and rule(value, file)
                if ours and re.fullmatch("<.*>", str(value)):
                    flag = next(iter(ours))
                    file.refuse(f"a placeholder: put a value there, or give --{flag}", flag)
                    ours = {}
            except (TypeError, ValueError) as error:
                of = key if isinstance(value, dict) else f"{key}: {value}"
                raise ValueError(f"{path}: {of}: {error}") from None
            if ours is not NOTHING:
                found.values |= ours
            elif key not in used:
                found.nothing.append(key)
    return found


# ---- reading ----


def unwrap(recipe: dict) -> tuple[dict, Translation]:
    """(what the training script reads, what becomes of the rest).

    A platform's file has that under `parameters`, its own name as that of the run, and a command,
    which may set keys of `parameters` by `a.b=value`.
    """
    if not isinstance(recipe.get("parameters"), dict):
        return recipe, Translation()
    expected = ("parameters", "name", "command", *PLATFORM)
    if unknown := [key for key in recipe if key not in expected]:
        raise ValueError(
            f"unknown key {unknown[0]!r} beside parameters: leave it out if it changes no result"
        )
    inner = dict(recipe["parameters"])
    name = "base_run_name" if "tasks" in inner else "run_name"
    if inner.get(name) is None:
        inner[name] = recipe.get("name")
    rest = Translation(nothing=[key for key in PLATFORM if recipe.get(key) is not None])
    for key, value in set_by_command(recipe.get("command") or ""):
        inner = put(inner, key.split("."), value)
        rest.remarks.append(f"command: sets {key} to {value}")
    return inner, rest


PLATFORM = ("image", "compute", "integrations", "cluster", "gpu_num", "gpu_type", "scheduling")


def set_by_command(command: str) -> list[tuple[str, object]]:
    """Keys and values that are set behind `SCRIPT.py FILE.yaml`."""
    found = []
    for line in command.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        words.whitespace_split = True
        awaited = suffixes = [".py", ".yaml"]
        for word in words:
            if re.fullmatch("[;&|<>]+", word):
                awaited = suffixes
            elif awaited:
                awaited = awaited[word.endswith(awaited[0]) :]
            else:
                key, equals, value = word.partition("=")
                if not equals or "$" in value.replace("${", ""):
                    raise ValueError(f"command: {word!r} is no KEY=VALUE: write it in parameters")
                found.append((key, yaml.safe_load(value)))
    return found


def put(recipe: dict, path: list[str], value) -> dict:
    """The recipe with this value at a path of keys."""
    first, *rest = path
    if rest:
        inner = recipe.get(first)
        value = put(inner if isinstance(inner, dict) else {}, rest, value)
    return recipe | {first: value}


REFERENCE = re.compile(r"\$\{([^{}]*)\}")


def interpolate(recipe: dict) -> tuple[dict, set[str]]:
    """(the recipe with the values of other keys in place of `${a.b}`, paths of those keys).

    A `${a.b}` that is all of a value keeps its type, also none.

    Raises:
        ValueError: there is no such key, it has no text, or it leads back to itself.
    """
    used = set()

    def look_up(name: str, way: tuple[str, ...]):
        if name in way:
            raise ValueError(f"${{{name}}} leads back to itself: {' -> '.join((*way, name))}")
        value = recipe
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"${{{name}}} names no key of the file: write the value there")
            value = value[part]
        used.add(name)
        return fill(value, (*way, name))

    def text(name: str, way: tuple[str, ...]) -> str:
        value = look_up(name, way)
        if value is None or isinstance(value, dict | list):
            raise ValueError(f"${{{name}}} is part of a text, and has none: give {name} a value")
        return str(value)

    def fill(value, way: tuple[str, ...] = ()):
        if isinstance(value, dict):
            return {key: fill(x, way) for key, x in value.items()}
        if isinstance(value, list):
            return [fill(x, way) for x in value]
        if not isinstance(value, str):
            return value
        if whole_value := REFERENCE.fullmatch(value):
            return look_up(whole_value[1], way)
        return REFERENCE.sub(lambda match: text(match[1], way), value)

    return fill(recipe), used


def flat(recipe: dict, table: dict, prefix: str = ""):
    """(dotted path, value) of each key that has no keys below it, or has a row of the table."""
    for name, value in recipe.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in table:
            yield from flat(value, table, f"{key}.")
        # A group that is empty says nothing.
        elif value or not any(row.startswith(f"{key}.") for row in table):
            yield key, value


def may_be_null(key: str, kind: Kind, given: dict) -> bool:
    """Whether our default changes nothing where this key has no value."""
    rule = kind.table[key]
    return rule is NOTHING or rule in given or key.split(".")[-1] in MAY_BE_NULL
