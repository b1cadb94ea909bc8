// The heat map of one head, tokens on both axes, and the model view of all heads of all layers.

/** Returns a canvas with a pixel per code, transparent below 0, which is masked;
* `full` gives the code of the strongest colour, by row. */
function picture(width, height, codeAt, full) {
  const canvas = new OffscreenCanvas(width, height), ctx = canvas.getContext("2d");
  const image = ctx.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
  for (let t = 0, place = 0; t < height; t++) {
    const most = full(t);
    for (let s = 0; s < width; s++, place++) {
      const code = codeAt(t, s);
      if (code >= 0) pixels[place] = pixelOf(code / most);
    }
  }
  ctx.putImageData(image, 0, 0);
  return canvas;
}

/** A cache of drawn pictures, by name, theme and scale. */
class Pictures {
  constructor(most) {
    this.most = most;
    this.made = new Map();
  }

  of(name, make) {
    const full = `${name}|${colours.theme}|${state.scale}`;
    if (!this.made.has(full)) {
      if (this.made.size >= this.most) this.made.delete(this.made.keys().next().value);
      this.made.set(full, make());
    }
    return this.made.get(full);
  }
}

const mapView = {
  name: "Heat map",
  pictures: new Pictures(4),

  layout(ctx, part, view) {
    ctx.font = font(12);
    const most = Math.max(50, Math.min(150, view.width * 0.22));
    const left = widest(ctx, part.rows, most) + 16;
    const top = widest(ctx, part.columns, most) + 16;
    const fits = Math.min((view.width - left - 16) / part.S, (view.height - top - 12) / part.T);
    const readable = state.zoom ? 18 : 1;
    const cell = Math.max(readable, Math.min(34, Math.floor(fits)));
    const spare = view.width - left - cell * part.S;
    return { left: left + Math.max(0, Math.floor(spare / 2 - 8)), top, cell };
  },

  extent(ctx, part, width, height) {
    const { left, top, cell } = this.layout(ctx, part, { width, height });
    return { width: left + cell * part.S + 12, height: top + cell * part.T + 10 };
  },

  focus() {
    return { row: hover?.row ?? state.token, column: hover?.column };
  },

  draw(ctx, part, view) {
    const { left, top, cell } = this.layout(ctx, part, view), { row, column } = this.focus();
    const head = state.head, weights = part.weights[state.layer];
    const image = this.pictures.of(`${part.index}|${state.layer}|${head}`, () =>
      picture(part.S, part.T,
        (t, s) => (part.hides(state.layer, t, s) ? -1 : weights[part.start(head, t) + s]),
        (t) => fullOf(part, weights, part.start(head, t), part.reach(t))));
    const x = (s) => left + cell * s - view.left, y = (t) => top + cell * t - view.top;
    ctx.save();
    ctx.beginPath();
    ctx.rect(left - 2, top - 2, view.width, view.height);
    ctx.clip();
    ctx.imageSmoothingEnabled = false;
    ctx.fillStyle = colours.hidden;
    ctx.fillRect(x(0), y(0), cell * part.S, cell * part.T);
    ctx.drawImage(image, x(0), y(0), cell * part.S, cell * part.T);
    ctx.strokeStyle = colours.edge;
    ctx.strokeRect(x(0) - 0.5, y(0) - 0.5, cell * part.S + 1, cell * part.T + 1);
    ctx.strokeStyle = colours.chosen;
    ctx.lineWidth = 1.5;
    if (row != null) ctx.strokeRect(x(0) - 1, y(row) - 1, cell * part.S + 2, cell + 2);
    if (column != null) ctx.strokeRect(x(column) - 1, y(0) - 1, cell + 2, cell * part.T + 2);
    ctx.restore();
    this.labels(ctx, part, view, { left, top, cell, row, column, x, y });
  },

  /** Draws as many labels as fit, and always those of the cell under the mouse. */
  labels(ctx, part, view, { left, top, cell, row, column, x, y }) {
    const every = Math.ceil(14 / cell), half = cell / 2;
    ctx.font = font(12);
    ctx.textBaseline = "middle";
    const label = (token, chosen, draw) => {
      ctx.fillStyle = colours.ink;
      if (chosen) draw(() => plate(ctx, -4, 0, 8 + ctx.measureText(token).width));
      if (chosen) ctx.fillStyle = colours["on-chosen"];
      draw(() => ctx.fillText(token, 0, 0));
    };
    const rowLabel = (t, chosen) => {
      const text = fit(ctx, part.rows[t], left - 12), width = ctx.measureText(text).width;
      if (y(t) + half < top - 2) return;
      label(text, chosen, (draw) => moved(ctx, left - 8 - width, y(t) + half, 0, draw));
    };
    const shown = part.columns.filter((_, s) => s % every === 0);
    const upright = widest(ctx, shown, top - 14) <= every * cell - 2; // Chinese tokens, say.
    const columnLabel = (s, chosen) => {
      const text = fit(ctx, part.columns[s], top - 14), width = ctx.measureText(text).width;
      if (x(s) + half < left - 2) return;
      label(text, chosen, (draw) =>
        upright
          ? moved(ctx, x(s) + half - width / 2, top - 13, 0, draw)
          : moved(ctx, x(s) + half, top - 8, -Math.PI / 2, draw));
    };
    ctx.textAlign = "left";
    for (let t = 0; t < part.T; t += every) if (y(t) < view.height) rowLabel(t, false);
    for (let s = 0; s < part.S; s += every) if (x(s) < view.width) columnLabel(s, false);
    if (row != null) rowLabel(row, true);
    if (column != null) columnLabel(column, true);
  },

  hit(ctx, part, view, mouseX, mouseY) {
    const { left, top, cell } = this.layout(ctx, part, view);
    const column = Math.floor((mouseX + view.left - left) / cell);
    const row = Math.floor((mouseY + view.top - top) / cell);
    const inRows = row >= 0 && row < part.T && mouseY >= top;
    const inColumns = column >= 0 && column < part.S && mouseX >= left;
    if (inRows && inColumns) return { row, column };
    if (inRows && mouseX < left) return { row };
    return inColumns && mouseY < top ? { column } : null;
  },

  tip(part, { row, column }) {
    if (row == null || column == null)
      return [row == null ? named(part.columns, column) : named(part.rows, row)];
    const pair = [...named(part.rows, row), " attends to ", ...named(part.columns, column)];
    if (column >= part.reach(row)) return [pair, ["masked: a later token"]];
    if (part.hides(state.layer, row, column))
      return [pair, ["masked: outside the window"]];
    return [pair, ["weight ", digits(part.weight(state.layer, state.head, row, column))]];
  },

  click(part, found) {
    if (found.row != null) choose({ token: state.token === found.row ? null : found.row });
  },

  row: (_, found) => found.row,

  legend: (part) => ({
    meaning: "Rows: queries; columns: keys; stronger: more.",
    colour: (share) => css(pixelOf(share)),
    hidden: part.masked,
  }),

  caption(part) {
    const { layers, heads } = part;
    return `Layer ${layers[state.layer]}, head ${heads[state.head]}: each cell is the weight with
    which the token of its row attends to the token of its column.`;
  },
};

const modelView = {
  name: "Model view",
  pictures: new Pictures(4000),

  layout(part, view) {
    const wide = (view.width - 64) / part.heads.length;
    const high = (view.height - 40) / part.layers.length;
    const cell = Math.floor(Math.max(24, Math.min(220, wide, Math.max(44, high))));
    const left = Math.max(56, Math.floor((view.width - cell * part.heads.length) / 2));
    return { left, top: 30, cell };
  },

  extent(_, part, width, height) {
    const { left, top, cell } = this.layout(part, { width, height });
    return {
      width: left + cell * part.heads.length + 6,
      height: top + cell * part.layers.length + 10,
    };
  },

  draw(ctx, part, view) {
    const { left, top, cell } = this.layout(part, view);
    ctx.imageSmoothingEnabled = false;
    ctx.textBaseline = "middle";
    part.layers.forEach((_, layer) => {
      const y = top + cell * layer - view.top;
      if (y < -cell || y > view.height) return;
      part.heads.forEach((_, head) => {
        const x = left + cell * head - view.left, size = cell - 6;
        const thumbnail = part.thumbnails[layer]?.[head];
        if (thumbnail) {
          const longer = Math.max(thumbnail.width, thumbnail.height);
          const width = (size * thumbnail.width) / longer;
          const height = (size * thumbnail.height) / longer;
          ctx.fillStyle = colours.hidden;
          ctx.fillRect(x, y, width, height);
          ctx.drawImage(this.image(part, layer, head), x, y, width, height);
        }
        const current = layer === state.layer && head === state.head;
        const pointed = layer === hover?.layer && head === hover?.head;
        ctx.lineWidth = current || pointed ? 2 : 1;
        ctx.strokeStyle = current || pointed ? colours.chosen : colours.edge;
        ctx.strokeRect(x - 1, y - 1, size + 2, size + 2);
      });
    });
    this.numbers(ctx, part, view, left, top, cell);
  },

  image(part, layer, head) {
    return this.pictures.of(`${part.index}|${layer}|${head}`, () => {
      const { codes, width, height } = part.thumbnails[layer][head];
      const codeAt = (t, s) => codes[t * width + s];
      const largest = (t) => Math.max(1, ...codes.subarray(t * width, (t + 1) * width));
      return picture(width, height, codeAt, state.scale === "one" ? () => part.levels : largest);
    });
  },

  numbers(ctx, part, view, left, top, cell) {
    ctx.fillStyle = colours.page;
    ctx.fillRect(0, 0, view.width, top - 4);
    ctx.font = font(12);
    ctx.fillStyle = colours.faint;
    ctx.textAlign = "center";
    part.heads.forEach((name, head) =>
      ctx.fillText(name, left + cell * (head + 0.5) - 3 - view.left, 17));
    ctx.textAlign = "right";
    ctx.fillText("head", left - view.left - 8, 17);
    part.layers.forEach((name, layer) => {
      const y = top + cell * (layer + 0.5) - 3 - view.top;
      if (y > top) ctx.fillText(layer ? name : `layer ${name}`, left - view.left - 8, y);
    });
  },

  hit(_, part, view, x, y) {
    const { left, top, cell } = this.layout(part, view);
    const head = Math.floor((x + view.left - left) / cell);
    const layer = Math.floor((y + view.top - top) / cell);
    const known = part.layers[layer] != null && part.heads[head] != null && y >= top;
    return known ? { layer, head } : null;
  },

  tip(part, { layer, head }) {
    return [[`layer ${part.layers[layer]}, head ${part.heads[head]}`], ["click to open"]];
  },

  click(_, { layer, head }) {
    choose({ layer, head, shown: [head], view: "map" });
  },

  row: () => null,

  legend: (part) => mapView.legend(part),

  caption() {
    return `Rows are layers, the first on top, and columns heads; click one to open it.`;
  },
};
