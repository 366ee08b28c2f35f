"""Brings the hosts into folders of their own under build/hosts, as their users install them; once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[3]
HOSTS: Final = ROOT / "build" / "hosts"
# What llama.cpp of Debian's unstable needs, down to the C library.
_PACKAGES: Final = (
    *("llama.cpp-tools", "libllama0", "libggml0", "libc6", "libstdc++6", "libgcc-s1", "libgomp1"),
    *("libcurl4t64", "libssl3t64", "libzstd1", "zlib1g"),
)
_SOURCE: Final = "deb [signed-by={keyring}] http://deb.debian.org/debian sid main\n"
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class UnavailableError(Exception):
    """The host cannot be had on this machine, and why."""


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make` where it is not there; half of it is never taken for the whole."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def _run(*command: str | Path, cwd: Path | None = None) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UnavailableError(f"there is no {command[0]}") from error
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"{command[0]} failed: {error.stderr.strip()[-300:]}") from error


def python_with(*packages: str) -> Path:
    """The interpreter of an environment with the newest releases, or those named, of these packages."""

    def make(folder: Path) -> None:
        _run(sys.executable, "-m", "venv", "--copies", folder)
        _run(folder / "bin" / "python", "-m", "pip", "install", "-q", *packages)

    return _once(HOSTS / "-".join(packages).replace("==", "-"), make) / "bin" / "python"


def pinned(package: str) -> str:
    """The package as constraints.txt has it, where that is not the newest, which is tried anyway."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (pin,) = (line.split()[0] for line in lines if line.startswith(f"{package}=="))
    newest = python_with(package)
    code = f"from importlib.metadata import version; print(version({package!r}))"
    installed = subprocess.run([newest, "-c", code], check=True, capture_output=True, text=True)
    if pin == f"{package}=={installed.stdout.strip()}":
        raise UnavailableError(f"{pin} is the newest")
    return pin


def built(name: str, command: str) -> Path:
    """The interpreter of an environment that another command makes, which takes long."""
    folder = ROOT / "build" / name
    if not (folder / ".ready").exists():
        raise UnavailableError(f"not built yet: {command}")
    return folder / "bin" / "python"


def node() -> Path:
    """A folder from which Node.js finds node-llama-cpp."""
    return _once(
        HOSTS / "node",
        lambda folder: _run(
            *("npm", "install", "--silent", "--ignore-scripts", "--omit=dev"),
            *("--prefix", folder, "node-llama-cpp@3", "@node-llama-cpp/linux-x64@3"),
        ),
    )


def debian() -> Path:
    """The root of a file system that has Debian's llama.cpp and nothing else."""
    return _once(HOSTS / "debian", _unpack_debian)


def _unpack_debian(folder: Path) -> None:
    if not _KEYRING.exists():
        raise UnavailableError(f"there is no {_KEYRING}")
    apt = folder / "apt"
    (apt / "lists" / "partial").mkdir(parents=True)
    (apt / "cache" / "archives" / "partial").mkdir(parents=True)
    (apt / "sources.list").write_text(_SOURCE.format(keyring=_KEYRING))
    options = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
    }
    set_options = [f"-o{name}={value}" for name, value in options.items()]
    _run("apt-get", *set_options, "update")
    _run("apt-get", *set_options, "download", *_PACKAGES, cwd=apt)
    for package in apt.glob("*.deb"):
        _run("dpkg-deb", "-x", package, folder)
    shutil.rmtree(apt)
    for name in ("lib", "lib64"):  # as Debian has them
        if not (folder / name).exists():
            os.symlink(f"usr/{name}", folder / name)
