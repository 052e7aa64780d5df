"""Where configs and kernel sources lie, and how `--config classify/shapes_polyrelu` finds a shipped file."""

from __future__ import annotations

from pathlib import Path

import yaml

from ..errors import ZooError
from ..registry import did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]


class ConfigError(ZooError, ValueError):
    """A config that is not there, cannot be read, or is not YAML."""


def shipped_folder(name: str) -> Path:
    """`configs` or `cuda_kernels`: inside an installed package, else beside it in the repository."""
    installed = _PACKAGE / f"_{name}"
    return installed if installed.is_dir() else _PACKAGE.parent / name


def shipped_configs() -> dict[str, Path]:
    """Shipped configs by the name `--config` takes, e.g. "classify/shapes_polyrelu"."""
    folder = shipped_folder("configs")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def resolve(given: str) -> Path:
    """The file meant by `--config given`: that path if it exists, else a shipped config of that name.

    Raises:
        ConfigError: naming the nearest file.
    """
    path = Path(given)
    if path.is_file():
        return _readable(path)
    shipped = shipped_configs()
    name = path.with_suffix("").as_posix() if path.suffix in {".yaml", ".yml"} else path.as_posix()
    for candidate in (name, name.removeprefix("configs/")):
        if candidate in shipped:
            return _readable(shipped[candidate])
    beside = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    known = [*beside, *shipped, *(f"configs/{key}.yaml" for key in shipped)]
    what = f"{given!r} is a folder" if path.is_dir() else f"no config file at {given!r}"
    hint = did_you_mean(given, known, n=1)
    raise ConfigError(f"{what}.{hint} Shipped configs: {', '.join(k for k in shipped if k[0] != '_')}.")


def _readable(path: Path) -> Path:
    try:
        yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path} is not valid YAML{place}: {getattr(error, 'problem', error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    return path


def resolve_arguments(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Replace every `--config X`, `--config=X` and `-c X` by the file it means; also return those files."""
    out: list[str] = []
    files: list[Path] = []
    expecting = False
    for word in arguments:
        if expecting:
            files.append(resolve(word))
            out.append(str(files[-1]))
            expecting = False
        elif word in {"--config", "-c"}:
            out.append(word)
            expecting = True
        elif word.startswith("--config="):
            files.append(resolve(word.partition("=")[2]))
            out.append(f"--config={files[-1]}")
        else:
            out.append(word)
    return out, files
