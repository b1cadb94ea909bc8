"""Dark mode of a report's figures: a style sheet maps each colour to a counterpart.

So a figure follows the reader's colour scheme, on the page and as a file; viewers without style
sheets draw it on white.
"""

import colorsys
import re

import numpy as np
from matplotlib.colors import to_hex, to_rgb

from gptjax.plots import luminance

PAGE, INK = "#12151c", "#e7eaf0"
"""Replacements of white and black, as in `page.css`."""
CONTRAST = 4.5
"""The least contrast of a coloured line (WCAG 2.2 asks 3 for graphics and this for text)."""
COLOUR = re.compile("(fill|stroke): (#[0-9a-f]{6})")
STEP = 0.01


def follow_scheme(svg: str) -> str:
    """Returns the figure (from `plots.to_svg`) with a style sheet for dark mode."""
    rules = [f"svg text {{fill: {INK}}}"]
    rules += [
        f'svg [style*="{what}: {colour}"] {{{what}: {counterpart(colour)} !important}}'
        for what, colour in sorted(set(COLOUR.findall(svg)))
    ]
    sheet = "@media screen and (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}"
    return svg.replace("</style>", f"\n{sheet}</style>", 1)


def counterpart(colour: str) -> str:
    """Returns the colour in dark mode: greys inverted, others lightened to `CONTRAST`."""
    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    if saturation < STEP:
        red, green, blue = np.array(to_rgb(INK)) * (1 - light) + np.array(to_rgb(PAGE)) * light
        return to_hex((red, green, blue))
    while contrast(colour) < CONTRAST:
        light += STEP
        colour = to_hex(colorsys.hls_to_rgb(hue, light, saturation))
    return colour


def contrast(colour: str) -> float:
    """Returns the contrast ratio of a colour lighter than the page (WCAG 2.2)."""
    return (luminance(colour) + 0.05) / (luminance(PAGE) + 0.05)
