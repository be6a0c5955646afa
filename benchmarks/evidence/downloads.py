"""Packages, downloaded once and compared with their digests."""

import hashlib
import pathlib
import subprocess
import sys
import urllib.error
import urllib.request

from benchmarks.evidence.packages import Package
from rat_jax.errors import RatJaxError

DEBIAN_MIRROR = "https://deb.debian.org/debian"
DEBIAN_SNAPSHOT = "https://snapshot.debian.org/archive/debian/20261127T000000Z"  # keeps what mirrors have dropped
_BLOCK_BYTES = 1 << 20


class DownloadError(RatJaxError):
    """A package that cannot be had, or is another one than was asked for."""


def download(package: Package, folder: pathlib.Path, debian_mirror: str = DEBIAN_MIRROR) -> pathlib.Path:
    """The package's file in a folder, downloaded unless it is there.

    Wheels come by pip, and so from the index that it is configured for; Debian's packages from a mirror, or from
    Debian's archive of all versions.

    Raises:
      DownloadError: if there is none, or if its digest is not the recorded one.
    """
    path = folder / pathlib.PurePosixPath(package.file).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if package.is_wheel:
            _by_pip(package, folder)
        else:
            _from_mirrors(package, path, (debian_mirror, DEBIAN_SNAPSHOT))
    digest = _digest(path)
    if digest != package.sha256:
        raise DownloadError(f"{path} is not the recorded file: its sha256 is {digest}; delete it to download it again")
    return path


def _by_pip(package: Package, folder: pathlib.Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={folder}"]
    pip += ["--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none"]
    pip += ["--python-version=3.13"]  # sources are read, not run: they may be of a later Python than this one
    pip.append(f"{package.name}=={package.version}")
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode != 0:
        raise DownloadError(f"pip found no {package.file}: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")


def _from_mirrors(package: Package, path: pathlib.Path, mirrors: tuple[str, ...]) -> None:
    reasons = []
    for mirror in mirrors:
        unfinished = path.with_suffix(".part")
        try:
            with (
                urllib.request.urlopen(f"{mirror}/{package.file}", timeout=60) as answer,
                unfinished.open("wb") as file,
            ):
                while block := answer.read(_BLOCK_BYTES):
                    file.write(block)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reasons.append(f"{mirror}: {error}")
            continue
        unfinished.rename(path)
        return
    raise DownloadError(f"no mirror has {package.file}: {'; '.join(reasons)}")


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
