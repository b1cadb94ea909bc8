"""The byte-to-character map of byte-level BPE (Radford et al. 2019), without whitespace.

A byte that is printable in Latin-1 maps to that character, the others to U+0100 on, in order.
"""


def _alphabet() -> dict[str, int]:
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted({*range(256)} - {*printed})
    alphabet = {chr(byte): byte for byte in printed}
    return alphabet | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTES = _alphabet()
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}


def bytes_of(piece: str) -> bytes:
    """The bytes of a piece; characters that map to no byte are dropped."""
    return bytes(_BYTES[character] for character in piece if character in _BYTES)


def written_in_bytes(text: str) -> str:
    """The piece of the UTF-8 bytes of `text`."""
    return "".join(_CHARACTERS[byte] for byte in text.encode("utf-8"))
