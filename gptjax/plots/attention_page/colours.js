// Colours of the light and dark themes; the ramps are those of the figures, packed by Python.

const STEPS = 256;

/** Unpacks 256 colours into pixels of an ImageData. */
function unpackedRamp(packed) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const pixels = new Uint32Array(STEPS); // A pixel's bytes are red, green, blue, opacity.
  for (let i = 0; i < STEPS; i++) {
    const [red, green, blue] = bytes.subarray(3 * i, 3 * i + 3);
    pixels[i] = ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  }
  return pixels;
}

/** The hatching of masked cells, unlike any weight. */
function hatching() {
  const size = 6, canvas = new OffscreenCanvas(size, size), ctx = canvas.getContext("2d");
  ctx.fillStyle = colours.panel;
  ctx.fillRect(0, 0, size, size);
  ctx.strokeStyle = colours.faint;
  ctx.globalAlpha = 0.45;
  ctx.beginPath();
  for (const shift of [-size, 0, size]) {
    ctx.moveTo(shift - 1, size + 1);
    ctx.lineTo(shift + size + 1, -1);
  }
  ctx.stroke();
  return ctx.createPattern(canvas, "repeat");
}

const PALETTES = { // Of heads: neighbours differ in lightness, not only in hue.
  light: ["#0b5fa5", "#d97a00", "#0a8f6c", "#b04fa0", "#8a7400", "#4aa3df", "#c23b22", "#5b6478"],
  dark: ["#6fb1ff", "#ffb454", "#4fd6ab", "#e79bdb", "#d9c65a", "#a5dcff", "#ff8d75", "#b7bfd0"],
};
const DASHES = [[], [7, 4], [2, 3]]; // Heads 8 to 15 are dashed, the next dotted.

const colours = {};

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const style = getComputedStyle(document.documentElement);
  colours.theme = theme;
  colours.ramp = unpackedRamp(header.ramps[theme].sequential);
  colours.signed = unpackedRamp(header.ramps[theme].diverging);
  colours.heads = PALETTES[theme];
  for (const name of ["page", "panel", "ink", "faint", "edge", "chosen", "on-chosen"])
    colours[name] = style.getPropertyValue(`--${name}`).trim();
  colours.hidden = hatching();
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

/** The pixel of a value from 0 to 1. */
function pixelOf(strength, pixels = colours.ramp) {
  return pixels[Math.min(STEPS - 1, Math.round(strength * (STEPS - 1)))];
}

/** The colour of a number from -1 to 1: orange below 0, blue above. */
function signed(value) {
  return css(pixelOf((value + 1) / 2, colours.signed));
}
