"""Settings: a command's configuration from flags, ``--set``, ``--config`` and defaults, in order of precedence."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from zoft.errors import ConfigError

C = TypeVar("C", bound=BaseModel)

_FLAGS = {"models": "model", "tasks": "task", "methods": "method"}  # fields whose flag may be repeated


def resolve(
    config: type[C],
    flags: Mapping[str, Any],
    settings: Sequence[str] | None,
    file: Path | Mapping[str, Any] | None,
) -> C:
    """Return the configuration, an instance of ``config``, built from its sources.

    Args:
        config: pydantic class to build.
        flags: values by field name; None where a flag was not given.
        settings: ``key=value`` strings of ``--set``; ``key=null`` means None, ``options.rank=4`` sets an entry of
            the mapping ``options``.
        file: YAML file, a mapping from field names to values; or the ``config.json`` of a meta-training's folder,
            which holds such a mapping beside the hash of the base; or such a mapping, those of a run that is resumed.

    Raises:
        ConfigError: names all problems at once, each with its source.

    >>> from zoft.deploy.config import EvalConfig
    >>> resolve(EvalConfig, {"model": "m", "task": "sst2"}, ["batch_size=4"], None).batch_size
    4
    """
    renamed = getattr(config, "renamed", dict)  # where a setting had another name in earlier versions
    values = renamed(read_file(file) if isinstance(file, Path) else dict(file or {}))
    origins = dict.fromkeys(values, f"{file}: " if isinstance(file, Path) else "the run's settings: ")
    given = renamed(parse(settings or []))
    values = merged(values, given)
    origins |= dict.fromkeys((key.partition(".")[0] for key in given), "--set ")
    for key, value in flags.items():
        if (
            value is not None
            and key in config.model_fields
            and not (value is True and isinstance(values.get(key), dict))
        ):
            values[key], origins[key] = value, "--"
    try:
        return config(**values)
    except ValidationError as error:
        raise ConfigError(_describe(error, config, origins)) from error


def read_file(file: Path) -> dict[str, Any]:
    """Return the mapping that a settings file holds."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(values, dict) and set(values) == {"base_hash", "config"}:
        values = values["config"]
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{file}: expected lines of `name: value`, found {type(values).__name__}")
    return values


def parse(settings: Sequence[str]) -> dict[str, str | None]:
    """Return the values of ``--set key=value`` by key."""
    values: dict[str, str | None] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise ConfigError(f"--set {setting}: expected KEY=VALUE, such as --set batch_size=8")
        values[key.strip().replace("-", "_")] = None if value == "null" else value
    return values


def merged(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` overridden by ``given``; ``options.rank`` is an entry of the mapping ``options``.

    >>> merged({"lora": {"alpha": 8}, "seed": 1}, {"lora.rank": "4"})
    {'lora': {'alpha': 8, 'rank': '4'}, 'seed': 1}
    """
    values = dict(values)
    for key, value in given.items():
        name, dot, entry = key.partition(".")
        before = values.get(name)
        values[name] = {**(before if isinstance(before, dict) else {}), entry: value} if dot else value
    return values


def _describe(error: ValidationError, config: type[BaseModel], origins: Mapping[str, str]) -> str:
    problems = [_problem(details, config, origins) for details in _first_causes(error.errors())]
    if len(problems) == 1:
        return f"the settings do not fit: {problems[0]}"
    return f"{len(problems)} settings do not fit:\n" + "\n".join(f"  {problem}" for problem in problems)


def _first_causes(errors: Sequence[Any]) -> list[Any]:
    """The errors without those of lists that are too short only because an item is wrong."""
    places = [details["loc"] for details in errors]

    def follows(details: Any) -> bool:
        own = details["loc"]
        return details["type"] == "too_short" and any(len(p) > len(own) and p[: len(own)] == own for p in places)

    return [details for details in errors if not follows(details)]


def _problem(details: Any, config: type[BaseModel], origins: Mapping[str, str]) -> str:
    message = details["msg"].removeprefix("Value error, ")
    if not details["loc"]:
        files = [origin for origin in origins.values() if not origin.startswith("--")]
        return (files[0] if files else "") + message  # a problem of several settings together
    key, *inner = map(str, details["loc"])
    origin = origins.get(key, "")
    place = ".".join([key, *inner])
    name = origin + (_FLAGS.get(key, key.replace("_", "-")) if origin == "--" else place)
    if details["type"] == "extra_forbidden":
        return f"{name}: no such setting; {_nearest(key, config)}" if not inner else f"{name}: no such setting"
    if details["type"] == "missing":
        return f"{name}: missing"
    return f"{name}: {message[0].lower()}{message[1:]}, found {details['input']!r}"


def _nearest(key: str, config: type[BaseModel]) -> str:
    names = list(config.model_fields)
    near = difflib.get_close_matches(key, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
