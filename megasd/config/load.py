"""Load a config: YAML files and dotted overrides become real dataclasses, strictly.

`load_config` merges  dataclass defaults <- recipe row <- YAML files <- dotted overrides:

    config = load_config(["run.yaml"], ["algorithm.distill.beta=0.1", "rollout.num_prompts=8"], RECIPES)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import is_dataclass, replace
from functools import cache
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from megasd.config.schema import AlgorithmConfig, Config, ConfigError
from megasd.config.values import check_values

COMMAND_LINE = "command line"


def load_config(files: list[str], overrides: list[str], recipes: Mapping[str, AlgorithmConfig]) -> Config:
    """Merge defaults <- recipe row <- YAML `files` in order <- `overrides` ("optimizer.lr=1e-6").

    An override of a string key is taken as it is written; any other value is YAML. `null` switches
    an optional term off. A key below a term that is off switches it on, with its defaults.
    `${other.key}` refers to another key. recipes: name -> the algorithm of that recipe. Raises
    ConfigError for anything that is not exactly a key, a type and a value of schema.py.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    sources = [(path, _read_yaml(path)) for path in files] + [
        (COMMAND_LINE, _parse_override(text)) for text in overrides
    ]
    # dotted key -> the source that set it last
    origin: dict[str, str] = {}
    for source, tree in sources:
        _check_tree(tree, Config, "", source, origin)

    recipe = AlgorithmConfig.recipe
    for _, tree in sources:
        recipe = tree.get("algorithm", {}).get("recipe", recipe)
    if recipe not in recipes:
        where = origin.get("algorithm.recipe", "defaults")
        raise ConfigError(f"{where}: algorithm.recipe: no recipe {recipe!r}{_nearest(recipe, recipes)}")
    merged = OmegaConf.structured(Config(algorithm=replace(deepcopy(recipes[recipe]), recipe=recipe)))
    for source, tree in sources:
        try:
            merged = OmegaConf.merge(merged, tree)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {error.full_key or 'config'}: {_first_line(error)}") from error
    try:
        missing = OmegaConf.missing_keys(merged)
        config = None if missing else OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        where = origin.get(error.full_key or "", "config")
        raise ConfigError(f"{where}: {error.full_key or 'config'}: {_first_line(error)}") from error
    if config is None:
        key = min(missing)
        where = origin.get(key, files[-1] if files else COMMAND_LINE)
        raise ConfigError(
            f"{where}: {key}: is mandatory; set it in a file or add {key}=... to the command line"
        )
    check_values(config, origin)
    return cast(Config, config)


def split_items(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of a command into YAML files and overrides (key=value)."""
    overrides = [item for item in items if re.match(r"[\w.]+=", item)]
    return [item for item in items if item not in overrides], overrides


def override(algorithm: AlgorithmConfig, changes: list[str], source: str) -> AlgorithmConfig:
    """Return the algorithm with dotted `changes` such as "distill.beta=1".

    The changes are read and checked as `load_config` does. ConfigError names `source`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    origin: dict[str, str] = {}
    merged = OmegaConf.structured(algorithm)
    for text in changes:
        tree = _parse_override(f"algorithm.{text}", source)
        _check_tree(tree, Config, "", source, origin)
        try:
            merged = OmegaConf.merge(merged, tree["algorithm"])
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: algorithm.{error.full_key}: {_first_line(error)}") from error
    try:
        changed = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: algorithm.{error.full_key}: {_first_line(error)}") from error
    check_values(changed, origin, "algorithm.")
    return cast(AlgorithmConfig, changed)


def to_yaml(config: Config) -> str:
    """The config as YAML text; `load_config` reads it back to an equal config."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give the path of a YAML file, or key=value") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as a YAML mapping: {_first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: must hold a mapping of sections ({', '.join(_types(Config))}), not a"
            f" {type(tree).__name__}"
        )
    return cast(dict[str, Any], tree)


def _parse_override(text: str, source: str = COMMAND_LINE) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{source}: {text!r} is not an override; write section.key=value")
    kind, optional = _type_at(parts)
    if kind is str or get_origin(kind) is Literal:
        # YAML would make other types of no, on, 1e5 and 0123.
        value: Any = (
            None
            if optional and raw in ("null", "~", "")
            else re.sub(r"""^(['"])(.*)\1$""", r"\2", raw, flags=re.DOTALL)
        )
    else:
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)
            value = cast(dict[str, Any], parsed)["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(
                f"{source}: {key}: {raw!r} is not a YAML value: {_first_line(error)}"
            ) from error
    tree: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        tree = {part: tree}
    return tree


def _check_tree(tree: dict[Any, Any], cls: type, prefix: str, source: str, origin: dict[str, str]) -> None:
    """Raise ConfigError where a mapping is not exactly the dataclass `cls`; fill `origin`.

    OmegaConf alone would accept `false` for a string and 1 for a bool.
    """
    types = _types(cls)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in types:
            raise ConfigError(f"{source}: {key}: unknown key{_suggest(name, prefix, types)}")
        kind, optional = types[name]
        if value is None and optional:
            origin[key] = source
        elif isinstance(kind, type) and is_dataclass(kind):
            if not isinstance(value, dict):
                what = "is empty" if value is None else f"must be a section of keys, not {value!r}"
                raise ConfigError(f"{source}: {key}: {what}; its keys are {', '.join(_types(kind))}")
            _check_tree(value, kind, f"{key}.", source, origin)
        else:
            origin[key] = source
            wrong = _type_error(value, kind)
            if wrong:
                raise ConfigError(f"{source}: {key}={value!r}: {wrong}{' (or null)' if optional else ''}")


def _type_error(value: Any, kind: Any) -> str | None:
    """Why `value` is not of `kind`; None when it is. References (`${...}`) are checked later."""
    if isinstance(value, str) and "${" in value:
        return None
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return (
            None
            if value in choices and isinstance(value, str)
            else f"must be one of {', '.join(choices)}{_nearest(value, choices, '')}"
        )
    if get_origin(kind) is list:
        if not isinstance(value, list):
            return "must be a list, as in [a, b]"
        wrong = [item for item in value if _type_error(item, get_args(kind)[0])]
        return f"the entry {wrong[0]!r} must be a string; quote it" if wrong else None
    if kind is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if kind is int:
        return None if isinstance(value, int) and not isinstance(value, bool) else "must be an integer"
    if kind is float:
        return None if isinstance(value, int | float) and not isinstance(value, bool) else "must be a number"
    return (
        None
        if isinstance(value, str)
        else f"must be a string, and YAML reads it as {type(value).__name__}; quote it"
    )


@cache
def _types(cls: type) -> dict[str, tuple[Any, bool]]:
    """Field name -> (type without Optional, whether None is allowed)."""
    found: dict[str, tuple[Any, bool]] = {}
    for name, hint in get_type_hints(cls).items():
        optional = get_origin(hint) is Union and type(None) in get_args(hint)
        found[name] = (
            (next(a for a in get_args(hint) if a is not type(None)), True) if optional else (hint, False)
        )
    return found


def _type_at(parts: list[str]) -> tuple[Any, bool]:
    """Type and optionality at a dotted key; (None, False) when there is no such key."""
    kind, optional = Config, False
    for part in parts:
        if not is_dataclass(kind) or part not in _types(kind):
            return None, False
        kind, optional = _types(kind)[part]
    return kind, optional


def _all_keys(cls: type, prefix: str = "") -> Iterator[str]:
    for name, (kind, _) in _types(cls).items():
        yield f"{prefix}{name}"
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _all_keys(kind, f"{prefix}{name}.")


def _suggest(name: Any, prefix: str, types: Mapping[str, Any]) -> str:
    """Suggest a near key of the section, else of another section, else name all keys."""
    if not isinstance(name, str):
        return f"; YAML reads it as {type(name).__name__}, and keys are strings"
    near = [prefix + match for match in difflib.get_close_matches(name, types, n=1)]
    everywhere = list(_all_keys(Config))
    near = near or [key for key in everywhere if key.rpartition(".")[2] == name.rpartition(".")[2]][:3]
    near = near or difflib.get_close_matches(prefix + name, everywhere, n=1, cutoff=0.8)
    nested = "; nest it under its section in a file" if "." in name else ""
    if near:
        return f"; did you mean {' or '.join(near)}?{nested}"
    return f"; the keys of {prefix.rstrip('.') or 'the top level'} are {', '.join(types)}{nested}"


def _nearest(value: Any, choices: Any, rest: str | None = None) -> str:
    """ "; did you mean X?" when a choice is near, else `rest` (None: the list of choices)."""
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; choose one of {', '.join(choices)}" if rest is None else rest


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
