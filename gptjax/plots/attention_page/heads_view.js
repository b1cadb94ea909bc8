// The head view: tokens in two columns, with lines from queries to keys.

const ROW = 24;
const BAR = ROW - 6; // Height of the largest bar.
const LEAST = 0.02; // Weaker lines are drawn only for a selected token: at most 50 per row.
const MOST_LINES = 600;
const LEVELS = 24;

const headsView = {
  name: "Head view",

  layout(ctx, part, width) {
    ctx.font = font();
    const many = state.shown.length, room = (width - 260) / many;
    const lane = many > 1 ? Math.max(8, Math.min(16, Math.floor(room))) : 0;
    const squares = many > 1 ? lane * many + 8 : 116;
    const most = Math.max(60, Math.min(180, (width - squares - 260) / 2));
    const left = widest(ctx, part.rows, most), right = widest(ctx, part.columns, most);
    const gap = Math.max(60, Math.min(420, width - left - right - squares - 130));
    const start = Math.max(16, (width - left - gap - right - squares - 64) / 2);
    const from = start + 34 + left;
    return { from, to: from + gap, left, right, squares, lane, top: 34 };
  },

  extent(ctx, part, width) {
    const { to, right, squares, top } = this.layout(ctx, part, width);
    return { width: to + right + squares + 24, height: top + ROW * Math.max(part.T, part.S) + 12 };
  },

  /** The selected row and column; those under the mouse take precedence. */
  focus() {
    if (hover?.row != null) return { row: hover.row };
    if (state.token != null) return { row: state.token, column: hover?.column };
    return { column: hover?.column };
  },

  draw(ctx, part, view) {
    const at = this.layout(ctx, part, view.width), focus = this.focus();
    const y = (token) => at.top + ROW * (token + 0.5) - view.top;
    const drawn = this.lines(ctx, part, view, at, focus, y);
    this.tokens(ctx, part, view, at, focus, y);
    ctx.fillStyle = colours.page;
    ctx.fillRect(0, 0, view.width, at.top - 4);
    ctx.fillStyle = colours.faint;
    ctx.font = font(12);
    ctx.textAlign = "right";
    ctx.fillText("query", at.from, 16);
    ctx.textAlign = "left";
    ctx.fillText("key", at.to, 16);
    this.least = drawn;
  },

  /** Draws the lines; returns the weight below which they are left out. */
  lines(ctx, part, view, at, focus, y) {
    const weights = part.weights[state.layer];
    const alone = focus.row != null || focus.column != null;
    const rows = this.rows(part, view, at, focus);
    const least = alone ? 1 / part.levels : this.threshold(part, weights, rows);
    const lane = Math.min(2.5, 13 / state.shown.length); // So that heads do not hide each other.
    state.shown.forEach((head, place) => {
      const aside = lane * (place - (state.shown.length - 1) / 2);
      const paths = new Map();
      for (let t = rows[0]; t < rows[1]; t++) {
        const start = part.start(head, t), reach = part.reach(t), from = y(t) + aside;
        const full = fullOf(part, weights, start, reach);
        const first = focus.row == null && focus.column != null ? focus.column : 0;
        const last = focus.row == null && focus.column != null ? first + 1 : reach;
        for (let s = first; s < Math.min(last, reach); s++) {
          const code = weights[start + s];
          if (code < least * part.levels) continue;
          const level = Math.min(LEVELS, Math.ceil((LEVELS * code) / full));
          if (!paths.has(level)) paths.set(level, new Path2D());
          const path = paths.get(level), to = y(s) + aside, bend = (at.to - at.from) / 3;
          path.moveTo(at.from + 7, from);
          path.bezierCurveTo(at.from + bend, from, at.to - bend, to, at.to - 7, to);
        }
      }
      ctx.strokeStyle = headColour(part.heads[head]);
      ctx.setLineDash(headDash(part.heads[head]));
      for (const [level, path] of [...paths].sort(([one], [other]) => one - other)) {
        ctx.globalAlpha = 0.08 + (0.87 * level) / LEVELS;
        ctx.lineWidth = 0.8 + (1.7 * level) / LEVELS;
        ctx.stroke(path);
      }
    });
    ctx.globalAlpha = 1;
    ctx.setLineDash([]);
    return alone ? 0 : least;
  },

  /** Returns the rows with lines: the selected one, all for a column, or else the visible ones. */
  rows(part, view, at, focus) {
    if (focus.row != null) return [focus.row, focus.row + 1];
    if (focus.column != null) return [0, part.T];
    const first = Math.max(0, Math.floor((view.top - at.top) / ROW));
    return [first, Math.min(part.T, Math.ceil((view.top + view.height - at.top) / ROW))];
  },

  /** Returns the least weight, from LEAST up, that leaves at most MOST_LINES lines. */
  threshold(part, weights, rows) {
    const counts = new Uint32Array(101);
    for (const head of state.shown)
      for (let t = rows[0]; t < rows[1]; t++) {
        const start = part.start(head, t), reach = part.reach(t);
        for (let s = 0; s < reach; s++)
          counts[Math.floor((100 * weights[start + s]) / part.levels)]++;
      }
    let hundredth = 100, lines = counts[100];
    while (hundredth > 100 * LEAST && lines + counts[hundredth - 1] <= MOST_LINES)
      lines += counts[--hundredth];
    return hundredth / 100;
  },

  tokens(ctx, part, view, at, focus, y) {
    ctx.textBaseline = "middle";
    const first = Math.max(0, Math.floor((view.top - at.top) / ROW));
    const last = first + Math.ceil(view.height / ROW) + 1;
    const full = focus.row == null ? 1 : this.largest(part, focus.row);
    for (let token = first; token < Math.min(last, part.T); token++) {
      const chosen = token === focus.row;
      if (chosen) plate(ctx, at.from - at.left - 5, y(token), at.left + 9);
      ctx.textAlign = "right";
      ctx.font = font(10);
      ctx.fillStyle = colours.faint;
      ctx.fillText(token, at.from - at.left - 9, y(token));
      ctx.font = font(13, chosen ? 600 : 400);
      ctx.fillStyle = chosen ? colours["on-chosen"] : colours.ink;
      ctx.fillText(fit(ctx, part.rows[token], at.left), at.from, y(token));
    }
    for (let token = first; token < Math.min(last, part.S); token++) {
      const chosen = token === focus.column;
      if (chosen) plate(ctx, at.to - 4, y(token), at.right + 9);
      ctx.textAlign = "left";
      ctx.font = font(13, chosen ? 600 : 400);
      ctx.fillStyle = chosen ? colours["on-chosen"] : colours.ink;
      ctx.fillText(fit(ctx, part.columns[token], at.right), at.to, y(token));
      if (focus.row != null) this.shares(ctx, part, at, focus.row, token, y(token), full);
    }
  },

  /** Returns the largest weight of a row over the shown heads. */
  largest(part, row) {
    const weights = part.weights[state.layer], reach = part.reach(row);
    let largest = 1;
    for (const head of state.shown)
      for (let start = part.start(head, row), s = 0; s < reach; s++)
        if (weights[start + s] > largest) largest = weights[start + s];
    return largest / part.levels;
  },

  /** Draws a bar per head beside a key: its weight; for a single head the number too. */
  shares(ctx, part, at, row, column, y, full) {
    const start = at.to + at.right + 14, floor = y + BAR / 2;
    if (part.hides(state.layer, row, column)) {
      ctx.fillStyle = colours.hidden;
      ctx.fillRect(start, y - 5, at.lane ? at.lane * state.shown.length - 4 : 52, 10);
      return;
    }
    if (!at.lane) {
      const weight = part.weight(state.layer, state.shown[0], row, column);
      ctx.fillStyle = colours.edge;
      ctx.fillRect(start, y - 5, 52, 10);
      ctx.fillStyle = headColour(part.heads[state.shown[0]]);
      ctx.fillRect(start, y - 5, weight ? Math.max(2, (52 * weight) / full) : 0, 10);
      ctx.font = font(11);
      ctx.fillStyle = colours.faint;
      ctx.fillText(digits(weight), start + 60, y);
      return;
    }
    state.shown.forEach((head, place) => {
      const weight = part.weight(state.layer, head, row, column), x = start + at.lane * place;
      ctx.fillStyle = colours.edge;
      ctx.fillRect(x, floor, at.lane - 3, 1);
      const height = weight ? Math.max(2, (BAR * weight) / full) : 0;
      ctx.fillStyle = headColour(part.heads[head]);
      ctx.fillRect(x, floor - height, at.lane - 3, height);
    });
  },

  hit(ctx, part, view, x, y) {
    const at = this.layout(ctx, part, view.width);
    const token = Math.floor((y + view.top - at.top) / ROW);
    if (y < at.top - 4 || token < 0) return null;
    const middle = (at.from + at.to) / 2;
    if (x < middle) return x > at.from - at.left - 36 && token < part.T ? { row: token } : null;
    return x < at.to + at.right + at.squares + 16 && token < part.S ? { column: token } : null;
  },

  tip(part, found) {
    if (found.column != null && state.token != null) {
      const pair = [...named(part.rows, state.token), " attends to ",
        ...named(part.columns, found.column)];
      return [pair, ...state.shown.map((head) => [`head ${part.heads[head]}: `,
        digits(part.weight(state.layer, head, state.token, found.column))])];
    }
    const isRow = found.row != null, others = isRow ? part.columns : part.rows;
    const most = [];
    for (const head of state.shown)
      for (let other = 0; other < others.length; other++)
        most.push({ head, other, weight: isRow
          ? part.weight(state.layer, head, found.row, other)
          : part.weight(state.layer, head, other, found.column) });
    most.sort((one, other) => other.weight - one.weight);
    const title = isRow
      ? [...named(part.rows, found.row), " attends most to"]
      : [...named(part.columns, found.column), " is attended to most by"];
    return [title, ...most.slice(0, 4).map(({ head, other, weight }) =>
      [`${digits(weight)} `, ...named(others, other), `, head ${part.heads[head]}`])];
  },

  click(part, found) {
    if (found.row != null) choose({ token: state.token === found.row ? null : found.row });
    else if (part.same) choose({ token: found.column });
  },

  row(_, found) {
    return found.row ?? (found.column == null ? null : state.token);
  },

  legend: (part) => ({
    meaning: "Queries (left) attend to keys; stronger: more.",
    colour: () => headColour(part.heads[state.head]),
    opacity: (share) => 0.08 + 0.87 * share,
    hidden: false,
  }),

  caption(part) {
    const { row } = this.focus();
    if (row != null && ready())
      return `Tokens on the left attend to those on the right; colours are heads. The longest bar is
      ${digits(this.largest(part, row))}${part.masked ? "; hatched: masked" : ""}.`;
      const which = this.least ? ` Lines from ${digits(this.least)} up: point at a token or
      click it to see all of its lines.` : "";
      return `Tokens on the left attend to those on the right; colours are heads.${which}`;
  },
};

function plate(ctx, x, y, width) {
  ctx.fillStyle = colours.chosen;
  ctx.beginPath();
  ctx.roundRect(x, y - 9, width, 18, 4);
  ctx.fill();
}

/** Returns the code shown as the strongest colour, for a row that begins at `start`. */
function fullOf(part, weights, start, reach) {
  if (state.scale === "one") return part.levels;
  let largest = 1;
  for (let s = 0; s < reach; s++) if (weights[start + s] > largest) largest = weights[start + s];
  return largest;
}
