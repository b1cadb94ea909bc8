// The neuron view: a query and its keys, their products by channel, and the sums.

const LINE = 20;

const neuronsView = {
  name: "Neuron view",

  layout(ctx, part, view) {
    ctx.font = font();
    const label = widest(ctx, part.columns, Math.max(60, Math.min(140, view.width * 0.16))) + 46;
    const thick = view.width < 520 ? 24 : 60, beside = 168 + thick; // The width of everything but bands.
    const room = (view.width - label - beside) / 2;
    const band = Math.max(Math.min(part.width, 40), Math.min(460, room));
    const start = Math.max(8, room - band);
    const key = start + label, product = key + band + 18;
    const sum = product + band + 62;
    const bar = sum + 14, end = bar + thick + 58;
    return { start, key, product, band, sum, bar, thick, end, top: 78 };
  },

  extent(ctx, part, width, height) {
    const { end, top } = this.layout(ctx, part, { width, height });
    return { width: end, height: top + LINE * part.reach(this.token(part)) + 12 };
  },

  token(part) {
    return state.token ?? part.T - 1;
  },

  /** The numbers of one token: its query, and the keys, products and scores of its keys. */
  numbers(part) {
    const token = this.token(part), { layer, head } = state;
    const name = [part.index, layer, head, token].join();
    if (this.known?.name !== name) {
      const { query, key } = part.vectors[layer];
      const queryVector = part.vector(query, token, head);
      const keys = Array.from({ length: part.reach(token) }, (_, s) => part.vector(key, s, head));
      const products = keys.map((vector) => vector.map((value, i) => value * queryVector[i]));
      const scores = products.map((product) => product.reduce((sum, value) => sum + value, 0));
      const most = (vectors) => vectors.reduce((largest, vector) =>
        vector.reduce((one, value) => Math.max(one, Math.abs(value)), largest), 1e-30);
      this.known = { name, queryVector, keys, products, scores, mostQuery: most([queryVector]),
        mostKey: most(keys), mostProduct: most(products) };
    }
    return this.known;
  },

  draw(ctx, part, view) {
    const at = this.layout(ctx, part, view), token = this.token(part);
    const { queryVector, keys, products, scores, ...most } = this.numbers(part);
    const left = -view.left;
    ctx.textBaseline = "middle";
    const first = Math.max(0, Math.floor((view.top - at.top) / LINE));
    const last = Math.min(keys.length, first + Math.ceil(view.height / LINE) + 1);
    for (let s = first; s < last; s++) {
      const y = at.top + LINE * s - view.top;
      if (s === hover?.column) {
        ctx.fillStyle = colours.edge;
        ctx.fillRect(left + at.start - 4, y, at.end - at.start, LINE);
      }
      this.label(ctx, part.columns, s, left + at.key, y + LINE / 2, at);
      this.band(ctx, keys[s], most.mostKey, left + at.key, y + 3, at.band, LINE - 6);
      this.band(ctx, products[s], most.mostProduct, left + at.product, y + 3, at.band, LINE - 6);
      ctx.fillStyle = colours.ink;
      ctx.textAlign = "right";
      ctx.fillText(scores[s].toFixed(2), left + at.sum, y + LINE / 2);
      this.weight(ctx, part, token, s, left + at.bar, y, at.thick);
    }
    this.heading(ctx, part, view, at, token, queryVector, most.mostQuery);
  },

  label(ctx, tokens, index, x, y, at) {
    ctx.textAlign = "right";
    ctx.font = font(10);
    ctx.fillStyle = colours.faint;
    ctx.fillText(index, x - at.key + at.start + 24, y);
    ctx.font = font();
    ctx.fillStyle = colours.ink;
    ctx.fillText(fit(ctx, tokens[index], at.key - at.start - 38), x - 8, y);
  },

  band(ctx, values, most, x, y, width, height) {
    const cell = width / values.length;
    values.forEach((value, i) => {
      ctx.fillStyle = signed(value / most);
      ctx.fillRect(x + i * cell, y, cell + 0.3, height);
    });
  },

  weight(ctx, part, token, s, x, y, thick) {
    const weight = part.weight(state.layer, state.head, token, s);
    const weights = part.weights[state.layer], start = part.start(state.head, token);
    const full = fullOf(part, weights, start, part.reach(token)) / part.levels;
    const hidden = part.hides(state.layer, token, s);
    ctx.fillStyle = hidden ? colours.hidden : css(pixelOf(0));
    ctx.fillRect(x, y + 3, thick, LINE - 6);
    ctx.fillStyle = css(pixelOf(0.65));
    ctx.fillRect(x, y + 3, thick * Math.min(1, weight / full), LINE - 6);
    ctx.font = font(11);
    ctx.textAlign = "left";
    ctx.fillStyle = colours.ink;
    ctx.fillText(hidden ? "masked" : digits(weight), x + thick + 8, y + LINE / 2);
    ctx.font = font();
  },

  /** Draws the query above its keys; it stays fixed while the rows scroll. */
  heading(ctx, part, view, at, token, queryVector, most) {
    const left = -view.left;
    ctx.fillStyle = colours.page;
    ctx.fillRect(0, 0, view.width, at.top - 2);
    this.label(ctx, part.rows, token, left + at.key, 22, at);
    this.band(ctx, queryVector, most, left + at.key, 12, at.band, LINE);
    ctx.font = font(12);
    ctx.fillStyle = colours.faint;
    ctx.textAlign = "left";
    ctx.fillText(`query q, ${queryVector.length} channels`, left + at.product, 22);
    ctx.fillText("key k", left + at.key, 58);
    ctx.fillText("q × k", left + at.product, 58);
    ctx.textAlign = "right";
    ctx.fillText("sum", left + at.sum, 58);
    ctx.textAlign = "left";
    ctx.fillText("weight", left + at.bar, 58);
    ctx.strokeStyle = colours.edge;
    ctx.lineWidth = 1;
    ctx.strokeRect(left + at.start - 4, at.top - 3.5, at.end - at.start, 0);
    ctx.font = font();
  },

  hit(ctx, part, view, x, y) {
    const at = this.layout(ctx, part, view), mouse = x + view.left;
    const channelIn = (start) => {
      const channel = Math.floor(((mouse - start) / at.band) * part.width);
      return channel >= 0 && channel < part.width ? channel : null;
    };
    const ofQuery = channelIn(at.key);
    if (y < at.top) return y < 34 && ofQuery != null ? { channel: ofQuery } : null;
    const column = Math.floor((y + view.top - at.top) / LINE);
    if (column >= part.reach(this.token(part))) return null;
    return { column, channel: ofQuery ?? channelIn(at.product) };
  },

  tip(part, { column, channel }) {
    const { queryVector, keys, products, scores } = this.numbers(part), token = this.token(part);
    const query = channel == null ? "" : `channel ${channel}: q ${queryVector[channel].toFixed(3)}`;
    if (column == null) return [named(part.rows, token), [query]];
    const lines = [[...named(part.rows, token), " attends to ", ...named(part.columns, column)]];
    if (channel != null)
      lines.push([`${query} × k ${keys[column][channel].toFixed(3)} = `
        + products[column][channel].toFixed(3)]);
    return [...lines, [`sum of all ${queryVector.length} products: ${scores[column].toFixed(3)}`],
      ["weight ", digits(part.weight(state.layer, state.head, token, column))]];
  },

  click(part, found) {
    if (found.column != null && part.same) choose({ token: found.column });
  },

  row(part) {
    return this.token(part);
  },

  legend: (part) => ({
    meaning: "Blue is above 0, orange below; bars: weights.",
    colour: (share) => css(pixelOf(share, colours.signed)),
    ends: ["−largest", "largest"],
    scale: "bars to",
    hidden: part.windows[state.layer] > 0,
  }),

  caption(part) {
    return `Layer ${part.layers[state.layer]}, head ${part.heads[state.head]}: the query of a token
    times the key of another, channel by channel; blue is above 0, orange below. The sum is the
    score before scaling, bias and mask; the weight is the softmax of the scores.`;
  },
};
