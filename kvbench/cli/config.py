"""`--config`: a YAML file whose values become the defaults of a command's options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from kvbench.cli.options import LIST
from kvbench.errors import InputError, did_you_mean
from kvbench.files import open_regular

MAPPINGS = ("option", "template-option")  # options that are KEY=VALUE
LARGEST = 1_000_000  # bytes of a configuration


def read_config(ctx: typer.Context, value: Path | None) -> Path | None:
    """Make a YAML file's values the defaults of the options that they name; the file."""
    return use_config(ctx, value)


def use_config(ctx: typer.Context, value: Path | None, also: Sequence[str] = ()) -> Path | None:
    """As `read_config`; options in `also`, which the command does not have, are passed over."""
    if value is None or ctx.resilient_parsing:
        return value
    options = {p.name.replace("_", "-"): p for p in ctx.command.params if p.name != "config"}
    defaults: dict[str, Any] = {}
    for key, setting in load(value).items():
        name = str(key).replace("_", "-")
        if name not in options and name.replace("-", "_") in also:
            continue
        if name not in options:
            raise InputError(f"{value}: unknown key '{key}': {did_you_mean(name, options)}")
        if name.replace("-", "_") in defaults:
            raise InputError(f"{value}: '{key}' is there twice; keep one")
        defaults[name.replace("-", "_")] = as_typed(value, name, setting, options[name])
    ctx.default_map = defaults
    return value


def load(file: Path) -> dict[str, Any]:
    """The keys of a YAML file. All values are texts, so that they mean what they mean when typed.

    InputError for a file that is no mapping, and for a key that is there twice.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if str(key.value) in seen:
                    line = key.start_mark.line + 1
                    raise InputError(f"{file}, line {line}: '{key.value}' is there twice; keep one")
                seen.add(str(key.value))
            return dict(super().construct_mapping(node, deep=deep))

    try:
        with open_regular(file) as opened:
            contents = opened.read(LARGEST)
        if len(contents) == LARGEST:
            raise InputError(f"the configuration {file} is longer than {LARGEST} bytes")
        config = yaml.load(contents.decode("utf-8-sig"), Loader)
    except OSError as error:
        raise InputError(f"cannot read the configuration {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read the configuration {file}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the configuration {file} is not YAML: {reason}") from error
    if not isinstance(config, dict):
        raise InputError(f"the configuration {file} is not a list of 'option: value' lines")
    return config


def as_typed(file: Path, name: str, value: Any, option: Any) -> Any:
    """A value of the file as it is typed on the command line; lists only where it takes several."""
    if name in MAPPINGS:
        if not isinstance(value, dict):
            raise InputError(f"{file}: {name} must be a mapping, like 'option: {{window: 32}}'")
        return [f"{key}={_text(file, key, v, name == 'option')}" for key, v in value.items()]
    text = _text(file, name, value, option.metavar == LIST)
    if not option.is_flag:
        return text
    if text.lower() not in ("true", "false"):
        raise InputError(f"{file}: {name} must be true or false, not {text}")
    return text.lower() == "true"


def _text(file: Path, name: str, value: Any, several: bool) -> str:
    if several and isinstance(value, list) and value:
        texts = [_text(file, name, each, False) for each in value]
        return ",".join(text.replace(",", r"\,") for text in texts)
    if not isinstance(value, str) or not value.strip():
        what = "a value or a list of values" if several else "a single value"
        raise InputError(f"{file}: {name} has no usable value; give {what}")
    return value
