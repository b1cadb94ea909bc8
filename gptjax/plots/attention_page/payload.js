// What Python packed: a header in JSON, and blocks of numbers as base64 of zlib.

/** The block of this id, unpacked; its text is then let go. */
async function unpacked(id) {
  const element = document.getElementById(id);
  const binary = atob(element.textContent);
  element.remove();
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(inflated).arrayBuffer());
}

/** Numbers of 16 bits, of which first all high bytes are given and then all low ones. */
function joined(planes) {
  const count = planes.length / 2;
  const codes = new Uint16Array(count);
  for (let i = 0; i < count; i++) codes[i] = (planes[i] << 8) | planes[count + i];
  return codes;
}

/** One kind of attention of the model. T tokens look, S are looked at. */
class Part {
  constructor(header, index) {
    Object.assign(this, header);
    this.index = index;
    this.T = this.rows.length;
    this.S = this.columns.length;
    this.size = this.causal ? (this.T * (this.T + 1)) / 2 : this.T * this.S;
    this.weights = []; // By layer, once it is unpacked: codes [N, T, S] or [N, T(T+1)/2].
    this.thumbnails = []; // By layer and head: {codes, width, height}.
    this.vectors = []; // By layer: {query, key}.
    this.pending = new Map();
  }

  once(name, work) {
    if (!this.pending.has(name)) this.pending.set(name, work());
    return this.pending.get(name);
  }

  load(layer) {
    return this.once(`weights-${layer}`, async () => {
      const weights = joined(await unpacked(`weights-${this.index}-${layer}`));
      this.thumbnails[layer] = this.heads.map((_, head) => this.pooled(weights, layer, head));
      this.weights[layer] = weights;
    });
  }

  loadVectors(layer) {
    return this.once(`vectors-${layer}`, async () => {
      const [query, key] = await Promise.all(
        ["query", "key"].map(async (name) => {
          const bytes = await unpacked(`${name}-${this.index}-${layer}`);
          const heads = name === "query" ? this.heads.length : this.keyHeads;
          const count = heads * (name === "query" ? this.T : this.S);
          const scales = new Float32Array(bytes.buffer.slice(0, 4 * count));
          return { scales, heads, codes: joined(bytes.subarray(4 * count)) };
        }),
      );
      this.vectors[layer] = { query, key };
    });
  }

  /** Where the row of query t of a head begins among a layer's codes. */
  start(head, t) {
    return head * this.size + (this.causal ? (t * (t + 1)) / 2 : t * this.S);
  }

  /** How many columns query t may look at. */
  reach(t) {
    return this.causal ? t + 1 : this.S;
  }

  /** Whether the mask of a layer hides key s from query t. */
  hides(layer, t, s) {
    const window = this.windows[layer];
    return s >= this.reach(t) || (window > 0 && Math.abs(t - s) >= window);
  }

  /** Whether a mask hides anything at all. */
  get masked() {
    return this.causal || this.windows.some((window) => window > 0);
  }

  weight(layer, head, t, s) {
    if (s >= this.reach(t)) return 0;
    return this.weights[layer][this.start(head, t) + s] / this.levels;
  }

  /** The vector [H] of a token and head. */
  vector({ scales, heads, codes }, token, head) {
    const own = token * heads + Math.floor((head * heads) / this.heads.length);
    const values = new Float32Array(this.width);
    for (let i = 0; i < this.width; i++) {
      const code = codes[own * this.width + i] - this.vectorLevels;
      values[i] = (scales[own] * code) / this.vectorLevels;
    }
    return values;
  }

  /** The largest weight of each square of tokens, at most 64 a side; -1 where all are hidden. */
  pooled(weights, layer, head) {
    const step = Math.ceil(Math.max(this.T, this.S) / 64);
    const width = Math.ceil(this.S / step), height = Math.ceil(this.T / step);
    const codes = new Int32Array(width * height).fill(-1);
    for (let t = 0; t < this.T; t++) {
      const start = this.start(head, t), row = Math.floor(t / step) * width;
      for (let s = 0, reach = this.reach(t); s < reach; s++) {
        const place = row + Math.floor(s / step);
        const code = this.hides(layer, t, s) ? -1 : weights[start + s];
        if (code > codes[place]) codes[place] = code;
      }
    }
    return { codes, width, height };
  }
}

const header = JSON.parse(document.getElementById("header").textContent);
const parts = header.parts.map((part, index) => new Part(part, index));
