"""Where text comes from."""

from pathlib import Path

from gptjax.config import InputError


def read_text(path: str | None) -> str:
    """The text of a UTF-8 file, or without a path the one that every Python installation carries.

    Line ends are kept as they are.

    Raises:
      InputError: a file that is missing, unreadable, empty, or not UTF-8.
    """
    if path is None:
        return embedded_corpus()
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"data.path: cannot read {path}: {error.strerror}.") from error
    if not data:
        raise InputError(f"data.path: {path} is empty.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise InputError(
            f"data.path: {path} is not UTF-8: byte 0x{byte:02x} at offset {error.start}."
        ) from error


def embedded_corpus() -> str:
    """Python's language reference, as `help()` shows it: about 465,000 characters of English.

    It lies in the standard library (`pydoc_data.topics`), so it needs no download; its wording
    follows the Python version.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
