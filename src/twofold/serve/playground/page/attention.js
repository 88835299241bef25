// The numbers of /playground/attribution: fetched when they are wanted, kept, and turned into what is shown.
//
// A map has, for every answer word, weights over source words, and where the rest of its attention went.

import { post } from "./api.js";

const MOST_AT_ONCE = 2_000_000; // weights: all layers come in one reply up to here, and one by one above

export class Attention {
  // asked: the model and the prompt, as the route takes them.
  constructor(asked, tokenIds, signal) {
    this.asked = { ...asked, answer_token_ids: tokenIds, encoding_format: "base64" };
    this.signal = signal;
    this.maps = new Map();
  }

  async load() {
    const reply = await this.#ask({}, null, null);
    this.layers = reply.num_layers;
    this.heads = reply.num_heads;
    this.source = inUnits(reply.source);
    this.answer = inUnits(reply.answer);
  }

  // Null stands for the mean over all layers or heads.
  async map(layer, head) {
    const name = `${layer}/${head}`;
    if (!this.maps.has(name)) {
      const few = this.layers * this.answer.words.length * this.source.words.length <= MOST_AT_ONCE;
      const heads = head === null ? {} : { heads: [head] };
      if (layer === null) await this.#ask(heads, null, head);
      else if (few) await this.#ask({ ...heads, keep: "layers" }, 0, head);
      else await this.#ask({ ...heads, layers: [layer] }, layer, head);
    }
    return this.maps.get(name);
  }

  async #ask(options, firstLayer, head) {
    const reply = await post("playground/attribution", { ...this.asked, ...options }, this.signal);
    const [layers, , answerWords, sourceWords] = reply.shape;
    const all = Object.fromEntries(["weights", "sink", "own", "elsewhere"].map((name) => [name, floats(reply[name])]));
    for (let i = 0; i < layers; i++) {
      const rows = (name, width) => all[name].subarray(i * answerWords * width, (i + 1) * answerWords * width);
      const map = new AttentionMap(answerWords, sourceWords, rows("weights", sourceWords), rows("sink", 1), rows("own", 1), rows("elsewhere", 1));
      this.maps.set(`${firstLayer === null ? null : firstLayer + i}/${head}`, map);
    }
    return reply;
  }
}

class AttentionMap {
  constructor(answerWords, sourceWords, weights, sink, own, elsewhere) {
    Object.assign(this, { answerWords, sourceWords, weights, sink, own, elsewhere });
    // Each row scaled to 1; then what of it exceeds the mean row: see infer.word_attribution.
    this.highlights = new Float32Array(weights.length);
    this.distinctive = new Float32Array(weights.length);
    const mean = new Float64Array(sourceWords);
    for (let a = 0; a < answerWords; a++) {
      const row = weights.subarray(a * sourceWords, (a + 1) * sourceWords);
      const total = row.reduce((sum, weight) => sum + weight, 0);
      row.forEach((weight, w) => {
        const share = total > 0 ? weight / total : 0;
        this.highlights[a * sourceWords + w] = share;
        mean[w] += share / answerWords;
      });
    }
    this.highlights.forEach((share, i) => (this.distinctive[i] = Math.max(0, share - mean[i % sourceWords])));
  }

  // What an answer word looked at: one number for each source word.
  row(view, answerWord) {
    return this[view].subarray(answerWord * this.sourceWords, (answerWord + 1) * this.sourceWords);
  }

  // Which answer words looked at a source word.
  column(view, sourceWord) {
    return Float32Array.from({ length: this.answerWords }, (_, a) => this[view][a * this.sourceWords + sourceWord]);
  }
}

function floats(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

// The server counts characters, JavaScript UTF-16 units: they differ behind an emoji.
function inUnits({ text, words }) {
  const at = [0];
  for (const character of text) at.push(at[at.length - 1] + character.length);
  return { text, words: words.map(([start, stop]) => [at[start], at[stop]]) };
}
