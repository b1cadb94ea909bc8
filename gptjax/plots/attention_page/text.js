// Text of tokens on the canvas.

const fitted = new Map();

function font(size = 13, weight = 400) {
  return `${weight} ${size}px ${getComputedStyle(document.body).fontFamily}`;
}

/** Returns the text, cut to at most `width` pixels in the context's font. */
function fit(ctx, text, width) {
  const name = `${ctx.font}|${width}|${text}`;
  if (!fitted.has(name)) {
    let kept = text;
    if (ctx.measureText(text).width > width) {
      const characters = Array.from(text);
      let least = 0, most = characters.length; // Binary search: a token may have thousands.
      while (least < most) {
        const middle = Math.ceil((least + most) / 2);
        const cut = characters.slice(0, middle).join("") + "…";
        if (ctx.measureText(cut).width <= width) least = middle;
        else most = middle - 1;
      }
      kept = characters.slice(0, least).join("") + "…";
    }
    fitted.set(name, kept);
  }
  return fitted.get(name);
}

/** Returns the width of the widest token in pixels, at most `most`. */
function widest(ctx, tokens, most) {
  let width = 0;
  for (const token of tokens) {
    width = Math.max(width, ctx.measureText(token).width);
    if (width >= most) return most;
  }
  return Math.ceil(width);
}

/** Returns a token for the tooltip: its text and its position. */
function named(tokens, index) {
  return [{ token: tokens[index] }, ` (${index})`];
}

/** Returns a weight with four decimals. */
function digits(weight) {
  return weight.toFixed(4);
}

/** Draws with the origin moved to x, y and rotated by an angle. */
function moved(ctx, x, y, angle, draw) {
  ctx.save();
  ctx.translate(x, y);
  ctx.rotate(angle);
  draw();
  ctx.restore();
}
