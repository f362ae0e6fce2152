"""Builds and runs the container image as root without a daemon: buildah and podman with a store of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
IMAGE = "localhost/pagestream:cpu"
_BASE, _BUILD = "localhost/base", "localhost/build"
_STORAGE = '[storage]\ndriver = "overlay"\ngraphroot = "{0}/store"\nrunroot = "{0}/run"\n'
_APT = "apt-get update -qq && apt-get install -qq -y --no-install-recommends g++ python3-venv >/dev/null"
_UNREAD = ("doc", "man", "locale")  # public slim images lack these too


@dataclass(frozen=True)
class Containers:
    folder: Path  # of the store
    cache: Path  # of the base image, kept from run to run

    def __call__(self, *command: str, check: bool = True, **options: Any) -> str:
        """Its standard output; what it says on standard error is in the exception."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, env=self.environment, check=False, **pipes | options)
        said = done.stderr or done.stdout
        assert not check or done.returncode == 0, f"{command}: exit code {done.returncode}\n{said[-3000:]}"
        return str(done.stdout).strip()

    @property
    def environment(self) -> dict[str, str]:
        storage = self.folder / "storage.conf"
        storage.write_text(_STORAGE.format(self.folder))
        conf = REPOSITORY / "deploy" / "test" / "containers.conf"
        return {**os.environ, "CONTAINERS_CONF": str(conf), "CONTAINERS_STORAGE_CONF": str(storage)}

    def build_image(self) -> None:
        """The target cpu of deploy/Containerfile on a local Debian, from wheels: the build itself has no network."""
        self("podman", "import", "--quiet", str(self._base()), _BASE)
        container = self("buildah", "from", "--pull-never", _BASE)
        self("buildah", "run", "--isolation", "chroot", container, "--", "sh", "-c", _APT)
        self("buildah", "commit", "--quiet", "--rm", container, _BUILD)
        build = ["buildah", "bud", "--isolation", "chroot", "--pull-never", "--format", "docker"]
        build += ["--volume", f"{self._wheels()}:/wheels:ro"]
        arguments = {"BUILD_IMAGE": _BUILD, "BASE_IMAGE": _BASE, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        for name, value in arguments.items():
            build += ["--build-arg", f"{name}={value}"]
        self(*build, "--target", "cpu", "--tag", IMAGE, "--file", "deploy/Containerfile", ".", cwd=REPOSITORY)

    def _base(self) -> Path:
        base = self.cache / "bookworm.tar"
        if not base.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            aside = base.with_suffix(".part.tar")
            excluded = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _UNREAD]
            packages = "--include=python3,ca-certificates"
            self("mmdebstrap", "--variant=minbase", packages, *excluded, "bookworm", str(aside))
            aside.rename(base)
        return base

    def _wheels(self) -> Path:
        wheels = self.folder / "wheels"
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        download += ["--only-binary=:all:", "--python-version", "3.11"]  # that of the base image
        self(*download, "torch==2.13.0+cpu", "--requirement", str(REPOSITORY / "deploy" / "requirements.txt"))
        return wheels

    def remove(self) -> None:
        self("podman", "rm", "--all", "--force", "--time", "0")
        self("umount", "--lazy", str(self.folder / "store" / "overlay"), check=False)
        self("rm", "-rf", str(self.folder))
