"""The embedded text, which needs no download: Python's own language reference."""

import hashlib

from gptjax.data.sources.protocol import check_index


def embedded_corpus() -> str:
    """Python's language reference, as `help()` shows it: about 465,000 characters of English.

    It is part of the standard library (`pydoc_data.topics`), so it needs no download; its wording
    depends on the Python version.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


class EmbeddedCorpus:
    """The embedded corpus as one document."""

    name = "embedded"

    def __init__(self):
        self._text = embedded_corpus()
        self.fingerprint = hashlib.sha256(self._text.encode("utf-8")).hexdigest()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> str:
        check_index(index, 1)
        return self._text
