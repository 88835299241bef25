// What is pointed at, and what lights up: an answer word shows what it looked at, a source word who looked at it.

import { locate } from "./reading.js";

const SAID_WORDS = 4;
const WHERE = [
  ["document", "document", "Words of the document"],
  ["prompt", "instruction", "The instruction, earlier turns, and the chat template"],
  ["own", "own words", "What the answer had said so far"],
  ["sink", "sink", "The first token and turn marks: where attention is parked that finds nothing"],
  ["gaps", "line breaks", "Line breaks and spaces of the source"],
];

export class Lens {
  // answers(): those that are shown. reading: the source.
  constructor(reading, answers) {
    Object.assign(this, { reading, answers, hovered: null, pinned: null, layer: null, head: null, view: "distinctive" });
    this.place = document.getElementById("lens");
    this.said = document.getElementById("said");
    const layer = document.getElementById("layer");
    layer.addEventListener("input", () => {
      this.layer = layer.value === "0" ? null : Number(layer.value) - 1;
      document.getElementById("layer-name").textContent = this.layer === null ? "all" : layer.value;
      this.show();
    });
    const head = document.getElementById("head");
    head.addEventListener("change", () => {
      this.head = head.value === "" ? null : Number(head.value);
      this.show();
    });
    document.getElementById("view").addEventListener("change", (event) => {
      this.view = event.target.value;
      this.show();
    });
  }

  // Offers the layers and heads of the answers that are there.
  open() {
    const seen = this.answers().filter((answer) => answer.attention);
    this.place.hidden = seen.length === 0;
    this.hovered = this.pinned = null;
    if (!seen.length) return;
    const layer = document.getElementById("layer");
    layer.max = Math.min(...seen.map((answer) => answer.attention.layers));
    const heads = Math.min(...seen.map((answer) => answer.attention.heads));
    const head = document.getElementById("head");
    if (head.options.length !== heads + 1) {
      head.replaceChildren(new Option("all", ""), ...Array.from({ length: heads }, (_, i) => new Option(i + 1, i)));
    }
    this.layer = layer.value === "0" ? null : Number(layer.value) - 1;
    document.getElementById("layer-name").textContent = this.layer === null ? "all" : layer.value;
    this.head = head.value === "" ? null : Number(head.value);
    this.show();
  }

  close() {
    this.place.hidden = true;
    this.hovered = this.pinned = null;
  }

  // target: {side, word}, with side "source" for the document; null: nothing.
  point(target) {
    if (same(this.hovered, target)) return;
    this.hovered = target;
    this.show();
  }

  pin(target) {
    this.pinned = target === null || same(this.pinned, target) ? null : target;
    this.hovered = null;
    this.show();
    if (this.pinned && this.pinned.side !== "source" && this.strongest >= 0) this.reading.scrollTo(this.strongest);
  }

  async show() {
    const turn = (this.turn = {}); // a later call wins
    const seen = this.answers().filter((answer) => answer.attention);
    const target = this.hovered ?? this.pinned;
    let maps;
    try {
      maps = new Map(await Promise.all(seen.map(async (answer) => [answer, await answer.attention.map(this.layer, this.head)])));
    } catch (error) {
      this.said.textContent = `The attention of this layer could not be read: ${error.message}`;
      return;
    }
    if (turn !== this.turn) return;
    this.strongest = -1;
    this.#single(target);
    if (!maps.size) return;
    if (target === null) this.#rest(maps);
    else if (target.side === "source") this.#fromSource(target.word, maps);
    else this.#fromAnswer(target, maps);
    this.place.dataset.shown = `${this.view}/${this.layer}/${this.head}`;
  }

  #single(target) {
    const here = (side) => (target?.side === side ? target.word : null);
    const pinned = (side) => (this.pinned?.side === side ? this.pinned.word : null);
    this.reading.words.single(here("source"), pinned("source"));
    for (const answer of this.answers()) answer.words.single(here(answer.side), pinned(answer.side));
    document.body.classList.toggle("from-b", target?.side === "b");
    document.querySelector(".reads").classList.toggle("from-b", target?.side === "b");
  }

  #rest(maps) {
    this.reading.mark(null);
    for (const answer of this.answers()) answer.words.mark(null);
    const [answer, map] = maps.entries().next().value;
    this.said.textContent = "Point at a word of the answer or of the document; click to keep it. Arrow keys work too.";
    this.#ledger(answer, map, null);
  }

  #fromAnswer({ side, word }, maps) {
    const answer = this.answers().find((one) => one.side === side);
    const map = maps.get(answer);
    if (!map) return;
    const row = map.row(this.view, word);
    const numbers = this.reading.numbersIn(answer.attention.source, answer.turns);
    const values = numbers.map((number) => (number < 0 ? 0 : row[number]));
    const most = Math.max(...values, 0);
    this.strongest = most > 0 ? values.indexOf(most) : -1;
    this.reading.mark(most > 0 ? values.map((value) => value / most) : null);
    for (const one of this.answers()) one.words.mark(null);
    const top = values.map((value, at) => [value, at]).filter(([value]) => value > 0.1 * most && value > 0);
    top.sort((x, y) => y[0] - x[0]);
    const list = top.slice(0, SAID_WORDS).map(([value, at]) => [this.reading.words.text(at), value]);
    this.#say(answer.words.text(word), list.length ? ` looked${this.#more} at ` : " looked at nothing in particular", list);
    this.#ledger(answer, map, word);
  }

  #fromSource(word, maps) {
    this.reading.mark(null);
    const lists = [];
    for (const [answer, map] of maps) {
      const number = this.reading.numbersIn(answer.attention.source, answer.turns)[word];
      const column = number < 0 ? new Float32Array(map.answerWords) : map.column(this.view, number);
      const most = Math.max(...column, 0);
      answer.words.mark(most > 0 ? column.map((value) => value / most) : null);
      const top = Array.from(column, (value, at) => [value, at]).filter(([value]) => value > 0.2 * most && value > 0);
      top.sort((x, y) => y[0] - x[0]);
      if (top.length) lists.push(top.slice(0, SAID_WORDS).map(([value, at]) => [answer.words.text(at), value]));
    }
    this.#say(this.reading.words.text(word), lists.length ? ` was looked at${this.#more} by ` : " was looked at by no word more than others", ...lists);
    const [answer, map] = maps.entries().next().value;
    this.#ledger(answer, map, null);
  }

  get #more() {
    return this.view === "distinctive" ? " more than usual" : "";
  }

  #say(word, verb, ...lists) {
    const quoted = (text, element = "span") => Object.assign(document.createElement(element), { textContent: text });
    const sign = this.view === "distinctive" ? "+" : "";
    const parts = [quoted(`“${word}”`, "b"), verb];
    lists.forEach((list, nth) => list.forEach(([text, share], i) => {
      parts.push(i ? ", " : nth ? "; in the second by " : "", quoted(text, "b"), ` ${sign}${percent(share)}`);
    }));
    this.said.replaceChildren(...parts);
  }

  // Where the attention of one answer word went, or of all of them on average.
  #ledger(answer, map, word) {
    const rows = word === null ? Array.from({ length: map.answerWords }, (_, a) => a) : [word];
    const { kinds } = locate(answer.attention.source, answer.turns);
    const sums = { document: 0, prompt: 0, own: 0, sink: 0, gaps: 0 };
    for (const a of rows) {
      map.row("weights", a).forEach((weight, w) => (sums[kinds.get(w) ?? "prompt"] += weight));
      sums.own += map.own[a];
      sums.sink += map.sink[a];
      sums.gaps += map.elsewhere[a];
    }
    const bar = document.createElement("div");
    const legend = document.createElement("ul");
    for (const [kind, name, title] of WHERE) {
      const share = sums[kind] / rows.length;
      if (share < 0.005) continue;
      const piece = Object.assign(document.createElement("i"), { className: kind, title });
      piece.style.flexGrow = share;
      bar.append(piece);
      const entry = Object.assign(document.createElement("li"), { className: kind, title });
      entry.append(document.createElement("i"), `${name} `, Object.assign(document.createElement("b"), { textContent: percent(share) }));
      legend.append(entry);
    }
    document.getElementById("ledger").replaceChildren(bar, legend);
  }
}

function same(one, other) {
  return one?.side === other?.side && one?.word === other?.word;
}

function percent(share) {
  return share >= 0.0995 ? `${Math.round(share * 100)} %` : `${(share * 100).toFixed(1)} %`;
}
