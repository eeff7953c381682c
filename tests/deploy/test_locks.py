"""The locks of what is installed are complete and up to date, and a file with another hash is refused.

Installations here take tiny wheels from a folder, with no index, into a folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "deploy" / "locks"
EXTRAS = ("client", "server", "inference")
PINNED = re.compile(r"([A-Za-z0-9._-]+)==([^ ;]+)")

# Packages that no machine of ours installs: torch's CUDA libraries, and what other systems need.
ELSEWHERE = re.compile(r"(nvidia|cuda)-.+|triton|colorama|httpx2-jsfetch")


def records(lock: Path) -> list[str]:
    """Returns the lock's requirements, each with its hashes in one line."""
    return lock.read_text().replace("\\\n", " ").splitlines()


def versions(path: Path) -> dict[str, str]:
    found = (PINNED.match(line) for line in path.read_text().splitlines())
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def wheel(folder: Path, name: str, version: str = "1.0") -> str:
    """Makes a wheel with one module, and returns its hash."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


class Place:
    """A folder of wheels, a lock, and a folder to install into; the wheel `fedtune` comes last."""

    def __init__(self, folder: Path) -> None:
        self.wheels, self.lock, self.installed = folder / "wheels", folder / "lock.txt", folder / "installed"
        self.hashes = {name: wheel(self.wheels, name) for name in ("torch", "other", "fedtune")}

    def install(self, *options: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        own = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_TARGET": str(self.installed),
        }
        last = f"fedtune @ file://{self.wheels / 'fedtune-1.0-py3-none-any.whl'}"
        return subprocess.run(
            ["sh", ROOT / "deploy" / "locked.sh", *options, sys.executable, self.lock, last],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=kept | own | dict(environment or {}),
        )

    def there(self) -> set[str]:
        return {path.stem for path in self.installed.glob("*.py")}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_a_lock_names_is_installed_and_then_fedtune(place: Place) -> None:
    place.lock.write_text("".join(f"{name}==1.0 --hash={place.hashes[name]}\n" for name in ("torch", "other")))
    done = place.install()
    assert done.returncode == 0, done.stderr
    assert place.there() == {"torch", "other", "fedtune"}


def test_a_line_without_a_hash_is_refused(place: Place) -> None:
    place.lock.write_text(f"torch==1.0 --hash={place.hashes['torch']}\nother==1.0\n")
    done = place.install()
    assert done.returncode != 0
    assert "Hashes are required" in done.stderr
    assert place.there() == set()


def test_a_package_with_another_hash_is_refused(place: Place) -> None:
    place.lock.write_text(f"torch==1.0 --hash={place.hashes['torch']}\nother==1.0 --hash={place.hashes['fedtune']}\n")
    done = place.install()
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert place.there() == set()


def test_another_torch_comes_with_a_hash_of_its_own_and_without_the_locks_cuda(place: Place) -> None:
    elsewhere = place.hashes["fedtune"]  # no file here has it under these names
    cuda = "".join(f"{name}==1.0 \\\n    --hash={elsewhere}\n" for name in ("torch", "nvidia-cublas", "triton"))
    place.lock.write_text(f"{cuda}other==1.0 \\\n    --hash={place.hashes['other']}\n")
    refused = place.install("--torch-hash", elsewhere)
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    done = place.install("--torch-hash", place.hashes["torch"])
    assert done.returncode == 0, done.stderr
    assert place.there() == {"torch", "other", "fedtune"}


def test_another_index_without_a_hash_is_possible_and_said(place: Place) -> None:
    place.lock.write_text(f"torch==1.0 --hash={place.hashes['fedtune']}\nother==1.0 --hash={place.hashes['other']}\n")
    done = place.install("--extra-index-url", "https://cpu.example.org")
    assert done.returncode == 0, done.stderr
    assert "torch==1.0 is not checked by hash; give --torch-hash" in done.stderr


@pytest.mark.parametrize("lock", sorted(LOCKS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_line_of_a_lock_is_one_version_with_hashes_and_names_no_place(lock: Path) -> None:
    listed = records(lock)
    assert listed
    for record in listed:
        assert PINNED.match(record), record
        assert re.search(r"(--hash=sha256:[0-9a-f]{64}\s*)+$", record), record
        assert not re.search(r"://|@|--(?!hash=)", record), record


@pytest.mark.parametrize("lock", sorted(LOCKS.glob("*.txt")), ids=lambda path: path.stem)
def test_a_lock_and_the_constraints_have_the_same_versions(lock: Path) -> None:
    pinned = versions(ROOT / "constraints.txt")
    locked = {name: version for name, version in versions(lock).items() if not ELSEWHERE.fullmatch(name)}
    differing = {name: (version, pinned.get(name)) for name, version in locked.items() if pinned.get(name) != version}
    assert differing == {}, "run: make locks"


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_lock_has_what_the_project_asks_for(extra: str) -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked, wanted = versions(LOCKS / f"{extra}.txt"), list(project["dependencies"])
    extras = [extra]
    while extras:
        for line in project["optional-dependencies"][extras.pop()]:
            requirement = Requirement(line)
            if requirement.name == project["name"]:
                extras += requirement.extras
            else:
                wanted.append(line)
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(locked.get(name, "")), f"{requirement}: the lock has {locked.get(name)}"


def test_nothing_that_installs_names_another_index() -> None:
    for path in (ROOT / "deploy").rglob("*"):
        if path.is_file() and path.suffix in {".sh", ".txt", ""}:
            assert "download.pytorch.org" not in path.read_text(), path
