"""A report's figures on a dark page: each colour gets a counterpart, by a style sheet of its own.

So a figure follows the reader's scheme on the page and as a file beside the Markdown too; whatever
does not know style sheets draws it on white.
"""

import colorsys
import re

import numpy as np
from matplotlib.colors import to_hex, to_rgb

from gptjax.plots import luminance

PAGE, INK = "#12151c", "#e7eaf0"
"""What stands for white and for black; `page.css` has them too."""
CONTRAST = 4.5
"""Of a coloured line on the page, at least (WCAG 2.2 asks 3 of graphics and this of texts)."""
COLOUR = re.compile("(fill|stroke): (#[0-9a-f]{6})")
STEP = 0.01


def follow_scheme(svg: str) -> str:
    """The figure (of `plots.to_svg`) with the rules by which it is drawn where pages are dark."""
    rules = [f"svg text {{fill: {INK}}}"]
    rules += [
        f'svg [style*="{what}: {colour}"] {{{what}: {counterpart(colour)} !important}}'
        for what, colour in sorted(set(COLOUR.findall(svg)))
    ]
    sheet = "@media screen and (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}"
    return svg.replace("</style>", f"\n{sheet}</style>", 1)


def counterpart(colour: str) -> str:
    """The colour for a dark page: greys turned round, others lightened until they stand out."""
    hue, light, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    if saturation < STEP:
        red, green, blue = np.array(to_rgb(INK)) * (1 - light) + np.array(to_rgb(PAGE)) * light
        return to_hex((red, green, blue))
    while contrast(colour) < CONTRAST:
        light += STEP
        colour = to_hex(colorsys.hls_to_rgb(hue, light, saturation))
    return colour


def contrast(colour: str) -> float:
    """Of a colour that is lighter than the page, as in WCAG 2.2."""
    return (luminance(colour) + 0.05) / (luminance(PAGE) + 0.05)
