// The data packed by Python: a JSON header, and blocks of numbers as base64 of zlib.

/** Returns the unpacked block of this id, and frees its text. */
async function unpacked(id) {
  const element = document.getElementById(id);
  const binary = atob(element.textContent);
  element.remove();
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(inflated).arrayBuffer());
}

/** Returns 16-bit numbers from planes: all high bytes, then all low bytes. */
function joined(planes) {
  const count = planes.length / 2;
  const codes = new Uint16Array(count);
  for (let i = 0; i < count; i++) codes[i] = (planes[i] << 8) | planes[count + i];
  return codes;
}

/** One kind of attention of the model: T queries and S keys. */
class Part {
  constructor(header, index) {
    Object.assign(this, header);
    this.index = index;
    this.T = this.rows.length;
    this.S = this.columns.length;
    this.size = this.causal ? (this.T * (this.T + 1)) / 2 : this.T * this.S;
    this.weights = []; // By layer, once unpacked: codes [N, T, S] or [N, T(T+1)/2].
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

  /** Returns the offset of query t's row of a head in a layer's codes. */
  start(head, t) {
    return head * this.size + (this.causal ? (t * (t + 1)) / 2 : t * this.S);
  }

  /** Returns how many keys query t may attend to by the causal mask. */
  reach(t) {
    return this.causal ? t + 1 : this.S;
  }

  /** Whether a layer masks key s for query t. */
  hides(layer, t, s) {
    const window = this.windows[layer];
    return s >= this.reach(t) || (window > 0 && Math.abs(t - s) >= window);
  }

  /** Whether anything is masked at all. */
  get masked() {
    return this.causal || this.windows.some((window) => window > 0);
  }

  weight(layer, head, t, s) {
    if (s >= this.reach(t)) return 0;
    return this.weights[layer][this.start(head, t) + s] / this.levels;
  }

  /** Returns the vector [H] of a token and head. */
  vector({ scales, heads, codes }, token, head) {
    const own = token * heads + Math.floor((head * heads) / this.heads.length);
    const values = new Float32Array(this.width);
    for (let i = 0; i < this.width; i++) {
      const code = codes[own * this.width + i] - this.vectorLevels;
      values[i] = (scales[own] * code) / this.vectorLevels;
    }
    return values;
  }

  /** Returns a max-pooled thumbnail, at most 64 per side; -1 where all are masked. */
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
