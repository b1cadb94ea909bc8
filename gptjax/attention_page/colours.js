// Colours, for light and for dark pages. Ramps go evenly through lightness in OKLab (Ottosson
// 2020), so that equal steps of a weight look equal, and look alike to the colour-blind.

/** OKLCH as bytes of sRGB. */
function srgb(lightness, chroma, hue) {
  const a = chroma * Math.cos((hue * Math.PI) / 180), b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((linear) => {
    const value = linear <= 0.0031308 ? 12.92 * linear : 1.055 * linear ** (1 / 2.4) - 0.055;
    return Math.round(255 * Math.min(1, Math.max(0, value)));
  });
}

const STEPS = 256;

/** 256 colours of one hue as the pixels of an ImageData, from the page's to the strongest. */
function ramp(dark, hue) {
  const pixels = new Uint32Array(STEPS); // A pixel's bytes are red, green, blue, opacity.
  for (let i = 0; i < STEPS; i++) {
    const p = i / (STEPS - 1);
    const lightness = dark ? 0.21 + 0.74 * p : 0.985 - 0.685 * p;
    // Near white and near black screens have little colour; at 0 it is the page's own grey.
    const most = Math.min(0.15, 0.42 * (1 - lightness), 0.38 * lightness);
    const chroma = most * Math.min(1, 0.2 + 4 * p);
    const [red, green, blue] = srgb(lightness, chroma, hue);
    pixels[i] = ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  }
  return pixels;
}

const PALETTES = { // Of heads: lightness differs from neighbour to neighbour, not the hue alone.
  light: ["#0b5fa5", "#d97a00", "#0a8f6c", "#b04fa0", "#8a7400", "#4aa3df", "#c23b22", "#5b6478"],
  dark: ["#6fb1ff", "#ffb454", "#4fd6ab", "#e79bdb", "#d9c65a", "#a5dcff", "#ff8d75", "#b7bfd0"],
};
const DASHES = [[], [7, 4], [2, 3]]; // Heads 8 to 15 are dashed, the next dotted.

const colours = {};

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const dark = theme === "dark", style = getComputedStyle(document.documentElement);
  colours.theme = theme;
  colours.ramp = ramp(dark, 258);
  colours.negative = ramp(dark, 50);
  colours.heads = PALETTES[theme];
  for (const name of ["page", "panel", "ink", "faint", "edge", "chosen", "on-chosen"])
    colours[name] = style.getPropertyValue(`--${name}`).trim();
}

function headColour(head) {
  return colours.heads[head % colours.heads.length];
}

function headDash(head) {
  return DASHES[Math.floor(head / colours.heads.length) % DASHES.length];
}

/** A pixel of a ramp as CSS. */
function css(pixel) {
  return `rgb(${pixel & 255} ${(pixel >> 8) & 255} ${(pixel >> 16) & 255})`;
}

/** The pixel of a strength from 0 to 1. */
function pixelOf(strength, pixels = colours.ramp) {
  return pixels[Math.min(STEPS - 1, Math.round(strength * (STEPS - 1)))];
}

/** The colour of a number from -1 to 1: orange below 0, blue above. */
function signed(value) {
  return css(pixelOf(Math.abs(value), value < 0 ? colours.negative : colours.ramp));
}
