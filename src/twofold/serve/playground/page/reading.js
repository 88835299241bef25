// The source as the model read it: the parts a person wrote, word by word, without the chat template around them.

import { WordText } from "./words.js";

const TICK_FROM = 0.2;

export class Reading {
  constructor(place, ticks, on) {
    Object.assign(this, { place, ticks });
    this.words = new WordText(place, on);
  }

  // source: text and words as the server told them. turns: what was sent.
  show(source, turns) {
    this.words.clear();
    this.located = locate(source, turns);
    this.sameWords = new WeakMap();
    for (const { part, start, stop } of this.located.blocks) {
      const block = document.createElement("div");
      block.className = part.kind === "document" ? "block" : "block aside";
      const text = document.createElement("div");
      if (turns.length > 1) block.append(Object.assign(document.createElement("h3"), { textContent: part.label }));
      block.append(text);
      this.place.append(block);
      this.words.add(text, source.text, source.words, start, stop);
    }
  }

  // For each word shown, its number in another source of the same parts (another model's template moves it), or -1.
  numbersIn(source, turns) {
    if (!this.sameWords.has(source)) {
      const other = locate(source, turns).names;
      const numbers = new Map([...other].map(([word, name]) => [name, word]));
      const found = Array.from({ length: this.located.count }, (_, word) => numbers.get(this.located.names.get(word)) ?? -1);
      this.sameWords.set(source, found);
    }
    return this.sameWords.get(source);
  }

  // Marks words, and where they stand in a text that is longer than the pane.
  mark(strengths) {
    this.words.mark(strengths);
    const { scrollHeight, clientHeight } = this.place;
    const strong = scrollHeight > clientHeight && strengths ? [...this.words.spans].filter(([word]) => strengths[word] > TICK_FROM) : [];
    this.ticks.replaceChildren(...strong.map(([word, span]) => {
      const tick = document.createElement("i");
      tick.style.top = `${(100 * (span.offsetTop + span.offsetHeight / 2)) / scrollHeight}%`;
      tick.style.setProperty("--a", strengths[word].toFixed(4));
      return tick;
    }));
  }

  scrollTo(word) {
    const span = this.words.spans.get(word);
    const { scrollTop, clientHeight } = this.place;
    if (!span || (span.offsetTop > scrollTop && span.offsetTop + span.offsetHeight < scrollTop + clientHeight)) return;
    const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.place.scrollTo({ top: span.offsetTop - clientHeight / 2, behavior: isCalm ? "auto" : "smooth" });
  }
}

// Where the parts of the turns stand in a source; and for each word in one of them a name that says which it is.
export function locate(source, turns) {
  const blocks = [];
  const names = new Map();
  const kinds = new Map();
  let from = 0;
  turns.flatMap(partsOf).forEach((part, number) => {
    const start = source.text.indexOf(part.text, from);
    if (start < 0) return;
    const stop = (from = start + part.text.length);
    blocks.push({ part, start, stop });
    source.words.forEach(([first, last], word) => {
      if (first < start || last > stop) return;
      names.set(word, `${number} ${first - start} ${source.text.slice(first, last)}`);
      kinds.set(word, part.kind);
    });
  });
  return { blocks, names, kinds, count: source.words.length };
}

function partsOf(turn) {
  return turn.parts ?? [{ kind: "prompt", label: "Model", text: turn.content }];
}
