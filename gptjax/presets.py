"""Published models, and our own small ones, by name."""

from gptjax.config import InputError, TransformerConfig, near_names


def _gpt2(depth: int, width: int, heads: int) -> TransformerConfig:
    """GPT-2 (Radford et al. 2019, table 2; heads from the released hyper-parameters)."""
    return TransformerConfig(
        vocab_size=50257, context=1024, depth=depth, width=width, heads=heads, dropout=0.1
    )


PRESETS: dict[str, TransformerConfig] = {
    # experiments/quickstart.py; bytes.
    "quickstart": TransformerConfig(vocab_size=256, context=128, depth=4, width=128, heads=4),
    # nanoGPT's CPU configuration; the 65 characters of Tiny Shakespeare.
    "shakespeare-char": TransformerConfig(vocab_size=65, context=64, bias=False),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
}


def preset(name: str) -> TransformerConfig:
    """The config of the model called `name`.

    Raises:
      InputError: an unknown name; the near ones are listed.
    """
    if name not in PRESETS:
        raise InputError(f"Unknown preset {name!r}: {near_names(name, PRESETS)}")
    return PRESETS[name]
