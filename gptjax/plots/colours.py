"""Colour maps of figures and pages.

| colour | meaning |
|---|---|
| blue | above 0: darker is more (brighter on a dark page) |
| orange | below 0, likewise |
| white | 0, or the minimum (on a dark page, the page's colour) |
| hatched | masked: no value |
| grey | unknown (NaN) |

Ramps are uniform in OKLab lightness (Ottosson 2020): perceptually uniform, ordered in greyscale and
colour-blind safe.
"""

import numpy as np

BLUE, ORANGE = 258.0, 50.0
"""Hues in OKLCH, degrees."""
STEPS = 256
MOST_CHROMA = 0.15

# From OKLab to the cube roots of cone responses, and from cone responses to linear sRGB (Ottosson).
_CONES = np.array(
    [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.291485548],
    ]
)
_LINEAR = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.707614701],
    ]
)


def sequential(*, dark: bool = False) -> np.ndarray:
    """Returns colours [256, 3] of values from 0 up: red, green and blue from 0 to 1.

    Args:
      dark: for a dark page, where the largest value is the brightest.
    """
    return _ramp(BLUE, np.linspace(0.21, 0.95, STEPS) if dark else np.linspace(0.985, 0.2, STEPS))


def diverging(*, dark: bool = False) -> np.ndarray:
    """Returns colours [256, 3] of signed values, centred at 0; as `sequential`.

    Both ends are more saturated, as only the hue distinguishes them.
    """
    lightness = np.linspace(*((0.21, 0.82) if dark else (0.985, 0.33)), STEPS // 2)
    return np.concatenate([_ramp(ORANGE, lightness)[::-1], _ramp(BLUE, lightness)])


def _ramp(hue: float, lightness: np.ndarray) -> np.ndarray:
    part = np.linspace(0, 1, len(lightness))
    # The sRGB gamut has little chroma near white and black; 0 is nearly grey.
    chroma = np.minimum(MOST_CHROMA, np.minimum(0.42 * (1 - lightness), 0.38 * lightness))
    chroma *= np.minimum(1, 0.2 + 4 * part)
    angle = np.deg2rad(hue)
    lab = np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], axis=-1)
    linear = np.clip((lab @ _CONES.T) ** 3 @ _LINEAR.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
