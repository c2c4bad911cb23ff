"""Rows on a local disk that nobody reads but the process that wrote them: Parquet's own encryption.

Every file gets a key of its own, which lives in this process's memory and nowhere else; with the process it is gone,
and with it the rows. AES-GCM under 256 bits covers every page, the footer and with it the columns' names: a file that
was changed cannot be read.
"""

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from sparkdl.errors import ConfigError

__all__ = ["decryption_of", "encrypted", "encryption_of"]

_KEY_BYTES = 32
_keys: dict[str, bytes] = {}  # by path: of what this process writes, as its file descriptors are


@contextlib.contextmanager
def encrypted(path: str) -> Iterator[None]:
    """Encrypt what is written to a path while the block runs, and decrypt what is read from it.

    Args:
        path: As writer and reader are given it; of a file that only this process reaches.

    Raises:
        ConfigError: This pyarrow cannot encrypt.
    """
    try:
        from pyarrow.parquet.encryption import create_encryption_properties  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "spark.io.encryption.enabled=true, so rows that ranks spool to their local disks must be encrypted, but "
            f"pyarrow {pa.__version__} on this executor cannot: {error}. Install pyarrow 25 or later there, or set "
            "stagingDir to storage that encrypts what lies in it."
        ) from error
    _keys[path] = secrets.token_bytes(_KEY_BYTES)
    try:
        yield
    finally:
        del _keys[path]


def encryption_of(path: str) -> Any:
    """The `pyarrow.parquet` properties for writing a path; None where it is not encrypted."""
    if path not in _keys:
        return None
    from pyarrow.parquet.encryption import create_encryption_properties

    return create_encryption_properties(footer_key=_keys[path])


def decryption_of(path: str) -> Any:
    """The `pyarrow.parquet` properties for reading a path; None where it is not encrypted."""
    if path not in _keys:
        return None
    from pyarrow.parquet.encryption import create_decryption_properties

    return create_decryption_properties(footer_key=_keys[path])
