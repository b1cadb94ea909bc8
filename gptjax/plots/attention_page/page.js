// The page's state, its controls, and drawing.

const VIEWS = { heads: headsView, model: modelView, map: mapView, neurons: neuronsView };
const byId = (id) => document.getElementById(id);
const stage = byId("stage"), canvas = byId("canvas"), context = canvas.getContext("2d");

const state = {
  view: "heads",
  part: 0,
  layer: 0, // Indices, like `head` and `shown`, into the page's layers and heads.
  head: 0,
  shown: [0], // The heads of the head view.
  token: null, // The query selected by a click.
  scale: "one", // The strongest colour is 1, or "row": each row's largest weight.
  zoom: false,
};
let hover = null;

/** Files and served pages have a URL to keep the state in; a notebook's frame has none. */
const hasAddress = /^(file|https?):$/.test(location.protocol);

function remember() {
  if (!hasAddress) return;
  const words = Object.entries(state).filter(([, value]) => value != null);
  history.replaceState(null, "", `#${new URLSearchParams(words)}`);
}

/** Returns the state in the URL, as far as it is valid for this page. */
function recalled() {
  const words = new URLSearchParams(location.hash.slice(1));
  const index = (name, length) => {
    const value = Number(words.get(name) ?? NaN);
    return Number.isInteger(value) && value >= 0 && value < length ? value : null;
  };
  const part = index("part", parts.length) ?? state.part, { layers, heads, T } = parts[part];
  const head = index("head", heads.length) ?? 0;
  const shown = [...new Set((words.get("shown") ?? "").split(",").filter(Boolean).map(Number))];
  const known = shown.length && shown.every((one) => Number.isInteger(one) && heads[one] != null);
  return {
    view: words.get("view") in VIEWS ? words.get("view") : state.view,
    part,
    layer: index("layer", layers.length) ?? 0,
    head,
    shown: known ? shown : [head],
    token: index("token", T),
    scale: words.get("scale") === "row" ? "row" : "one",
    zoom: words.get("zoom") === "true",
  };
}

/** Changes the state: every change goes through here. */
function choose(changes) {
  const before = { ...state };
  const another = (changes.part ?? state.part) !== state.part;
  if (another) Object.assign(state, { layer: 0, head: 0, shown: [0], token: null });
  Object.assign(state, changes);
  if (state.view === "neurons" && !parts[state.part].width) state.view = "heads";
  if (before.view !== state.view || another) stage.scrollTo(0, 0);
  hover = null;
  delete stage.dataset.drawn;
  remember();
  showControls();
  resize();
  need();
}

/** Unpacks what the view needs, then draws it. */
async function need() {
  const { part, layer, view } = state;
  await parts[part].load(layer);
  if (view === "neurons") await parts[part].loadVectors(layer);
  resize();
}

function chip(text, pressed, action, { label = "", own = "", apart = false } = {}) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  if (pressed != null) button.setAttribute("aria-pressed", pressed);
  if (label) button.setAttribute("aria-label", label);
  if (own && pressed) button.style.setProperty("--own", own);
  button.classList.toggle("apart", apart);
  button.addEventListener("click", action);
  return button;
}

/** Replaces the buttons of a group, keeping the focus. */
function fill(id, buttons) {
  const group = byId(id), at = [...group.children].indexOf(document.activeElement);
  group.replaceChildren(...buttons);
  group.children[at]?.focus();
}

function showControls() {
  const part = parts[state.part], many = state.view === "heads", all = part.heads.map((_, i) => i);
  fill("views", Object.entries(VIEWS).filter(([name]) => name !== "neurons" || part.width)
    .map(([name, view]) => {
      const button = chip(view.name, null, () => choose({ view: name }));
      button.setAttribute("role", "tab");
      button.setAttribute("aria-selected", name === state.view);
      return button;
    }));
  byId("parts-choice").hidden = parts.length === 1;
  fill("parts", parts.map((one, index) =>
    chip(one.name, index === state.part, () => choose({ part: index }))));
  fill("layers", part.layers.map((name, layer) =>
    chip(name, layer === state.layer, () => choose({ layer }), { label: `layer ${name}` })));
  const heads = part.heads.map((name, head) => {
    const pressed = many ? state.shown.includes(head) : head === state.head;
    const own = many ? headColour(name) : "";
    return chip(name, pressed, () => chooseHead(head), { label: `head ${name}`, own });
  });
  if (many && all.length > 1)
    heads.push(
      chip("all", null, () => choose({ shown: all }), { apart: true }),
      chip("one", null, () => choose({ shown: [state.head] })),
    );
  fill("heads", heads);
  showToken(part);
  showScale(part);
}

/** Toggles a head in the head view; selects it elsewhere. */
function chooseHead(head) {
  if (state.view !== "heads") return choose({ head, shown: [head] });
  const others = state.shown.filter((one) => one !== head);
  if (others.length === state.shown.length)
    choose({ head, shown: [...others, head].sort((one, other) => one - other) });
  else if (others.length)
    choose({ head: others.includes(state.head) ? state.head : others[0], shown: others });
}

function showToken(part) {
  byId("token-choice").hidden = state.view !== "neurons";
  const token = neuronsView.token(part), slider = byId("token");
  slider.max = part.T - 1;
  slider.value = token;
  byId("token-text").textContent = `${part.rows[token]} (${token})`;
}

function showScale(part) {
  const ramp = byId("ramp"), image = ramp.getContext("2d");
  const { meaning, colour, opacity, ends, scale, hidden } = VIEWS[state.view].legend(part);
  image.fillStyle = colours.page;
  image.fillRect(0, 0, ramp.width, ramp.height);
  for (let x = 0; x < ramp.width; x++) {
    const share = x / (ramp.width - 1);
    image.globalAlpha = opacity?.(share) ?? 1;
    image.fillStyle = colour(share);
    image.fillRect(x, 0, 1, ramp.height);
  }
  image.globalAlpha = 1;
  byId("meaning").textContent = meaning;
  byId("least").textContent = ends?.[0] ?? "0";
  byId("largest").textContent = ends ? `${ends[1]}; ${scale}` : "";
  byId("hidden").hidden = !hidden;
  const swatch = byId("swatch").getContext("2d");
  swatch.fillStyle = colours.hidden;
  swatch.fillRect(0, 0, 18, 10);
  fill("most", [
    chip("1", state.scale === "one", () => choose({ scale: "one" })),
    chip("row's largest", state.scale === "row", () => choose({ scale: "row" })),
    ...(state.view === "map" && Math.max(part.T, part.S) > 24
      ? [chip("large cells", state.zoom, () => choose({ zoom: !state.zoom }), { apart: true })]
      : []),
  ]);
  const vectors = part.width
    ? `, queries and keys to within 1/${2 * part.vectorLevels} of their largest numbers` : "";
  byId("precision").textContent =
    `Weights are stored to within ${(0.5 / part.levels).toFixed(6)}${vectors}.`;
}

/** Fits canvas and scroll bars to the view and the window, then draws. */
function resize() {
  const { clientWidth: width, clientHeight: height } = stage, pixels = devicePixelRatio;
  const part = parts[state.part], view = VIEWS[state.view];
  const across = Math.round(width * pixels), down = Math.round(height * pixels);
  if (canvas.width !== across || canvas.height !== down) {
    canvas.width = across;
    canvas.height = down;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const extent = view.extent(context, part, width, height);
  byId("extent").style.width = `${Math.max(width, Math.floor(extent.width))}px`;
  byId("extent").style.height = `${Math.max(height, Math.floor(extent.height))}px`;
  if (stage.clientWidth !== width || stage.clientHeight !== height) resize();
  else drawSoon();
}

function viewport() {
  const { clientWidth: width, clientHeight: height, scrollLeft: left, scrollTop: top } = stage;
  return { width, height, left, top };
}

/** Whether everything that the view shows is unpacked. */
function ready() {
  const { weights, vectors } = parts[state.part];
  return weights[state.layer] && (state.view !== "neurons" || vectors[state.layer]);
}

function draw() {
  const part = parts[state.part], view = VIEWS[state.view], seen = viewport();
  if (!ready()) return;
  context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  context.fillStyle = colours.page;
  context.fillRect(0, 0, seen.width, seen.height);
  context.save(); // So that views share no line styles or fonts.
  view.draw(context, part, seen);
  context.restore();
  const caption = view.caption(part).replace(/\s+/g, " ");
  if (byId("caption").textContent !== caption) byId("caption").textContent = caption;
  const layer = `layer ${part.layers[state.layer]}`;
  canvas.setAttribute("aria-label", `${view.name}, ${part.name}, ${layer}`);
  stage.dataset.drawn = `${state.view} ${state.part} ${state.layer}`;
}

let asked = 0;
function drawSoon() {
  asked ||= requestAnimationFrame(() => {
    asked = 0;
    draw();
  });
}

/** Shows the tooltip; its lines are texts and tokens, each token in its own writing direction. */
function showTip(lines, x, y) {
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((pieces) => {
    const line = document.createElement("div");
    line.append(...pieces.map((piece) => {
      if (typeof piece === "string") return piece;
      const token = document.createElement("b"), apart = document.createElement("bdi");
      apart.textContent = Array.from(piece.token).slice(0, 80).join("");
      token.append(apart);
      return token;
    }));
    return line;
  }));
  tip.hidden = !lines.length;
  const { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = `${Math.max(4, x + 16 + width > innerWidth ? x - width - 12 : x + 16)}px`;
  tip.style.top = `${Math.max(4, y + 18 + height > innerHeight ? y - height - 12 : y + 18)}px`;
}

function found(event) {
  const box = canvas.getBoundingClientRect(), part = parts[state.part];
  if (!ready()) return null;
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  return VIEWS[state.view].hit(context, part, viewport(), x, y);
}

function point(event) {
  const before = JSON.stringify(hover);
  hover = found(event);
  if (JSON.stringify(hover) !== before) drawSoon();
  showTip(hover ? tipOf(VIEWS[state.view], hover) : [], event.clientX, event.clientY);
  canvas.style.cursor = hover ? "pointer" : "default";
}

/** Returns a view's tooltip at a position, with the model's likely next tokens after the query. */
function tipOf(view, found) {
  const part = parts[state.part], lines = view.tip(part, found), row = view.row(part, found);
  const expected = part.next[row]?.flatMap(([token, share], place) =>
    [place ? ", " : "next: ", { token }, ` ${(100 * share).toFixed(1)}%`]);
  return expected ? [...lines, expected] : lines;
}

function leave() {
  hover = null;
  showTip([], 0, 0);
  drawSoon();
}

/** Moves an index by `by`, clamped to `count`. */
function step(index, by, count) {
  return Math.min(count - 1, Math.max(0, index + by));
}

function press(event) {
  if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const part = parts[state.part], views = Object.keys(VIEWS), { key } = event;
  const by = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 }[key];
  leave();
  if (by && /Left|Right/.test(key)) {
    const head = step(state.head, by, part.heads.length);
    choose({ head, shown: [head] });
  } else if (by && event.shiftKey) {
    choose({ token: step(state.token ?? (by > 0 ? -1 : part.T), by, part.T) });
    tell(part);
  } else if (by) choose({ layer: step(state.layer, by, part.layers.length) });
  else if (key === "Escape") choose({ token: null });
  else if (views[key - 1]) choose({ view: views[key - 1] });
  else return;
  event.preventDefault();
}

/** Shows what the selected token attends to, for readers without a mouse. */
function tell(part) {
  if (!ready()) return;
  const { left, top } = stage.getBoundingClientRect();
  if (state.view === "heads") stage.scrollTop = ROW * state.token - stage.clientHeight / 2;
  showTip(tipOf(headsView, { row: state.token }), left, top);
}

function listen() {
  canvas.addEventListener("mousemove", point);
  canvas.addEventListener("mouseleave", leave);
  canvas.addEventListener("click", (event) => {
    const what = found(event);
    if (what) VIEWS[state.view].click(parts[state.part], what);
    point(event);
  });
  stage.addEventListener("scroll", drawSoon);
  addEventListener("keydown", press);
  addEventListener("hashchange", () => choose(recalled()));
  byId("token").addEventListener("input", (event) => choose({ token: Number(event.target.value) }));
  byId("theme").addEventListener("click", () => {
    setTheme(colours.theme === "dark" ? "light" : "dark");
    choose({});
  });
  new ResizeObserver(() => {
    resize();
    draw(); // At once, or a frame would be blank.
  }).observe(stage);
}

/** Starts the page; then unpacks the remaining layers one by one, for the model view. */
async function start() {
  // A canvas does not wait for fonts: it would draw the system's glyphs.
  await Promise.allSettled([...document.fonts].map((face) => face.load()));
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  if (hasAddress) Object.assign(state, recalled());
  listen();
  choose({});
  for (const part of parts)
    for (let layer = 0; layer < part.layers.length; layer++) {
      await part.load(layer);
      if (state.view === "model") drawSoon();
    }
  stage.dataset.unpacked = "all";
}

start().catch((error) => {
  byId("caption").textContent = `This page could not be drawn: ${error.message}.`;
  throw error;
});
