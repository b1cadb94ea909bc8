"""How byte-level BPE (Radford et al. 2019) writes bytes as characters, none of them blank.

A byte that Latin-1 prints is that character; the others are those from U+0100 on, in order.
"""


def _alphabet() -> dict[str, int]:
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted({*range(256)} - {*printed})
    alphabet = {chr(byte): byte for byte in printed}
    return alphabet | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTES = _alphabet()
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}


def bytes_of(piece: str) -> bytes:
    """The bytes that a piece stands for; characters that stand for none are left out."""
    return bytes(_BYTES[character] for character in piece if character in _BYTES)


def written_in_bytes(text: str) -> str:
    """The piece that stands for the bytes of `text`."""
    return "".join(_CHARACTERS[byte] for byte in text.encode("utf-8"))
