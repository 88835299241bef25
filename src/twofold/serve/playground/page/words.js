// A text as words that can be pointed at with the mouse or walked through with the arrow keys.

export class WordText {
  // place: the element to fill. on: {enter(i), leave(), pin(i)} with numbers of words.
  constructor(place, on) {
    Object.assign(this, { place, on, spans: new Map(), order: [] });
    place.addEventListener("pointerover", (event) => this.#over(event));
    place.addEventListener("pointerleave", () => on.leave());
    place.addEventListener("click", (event) => this.#click(event));
    place.addEventListener("keydown", (event) => this.#key(event));
    place.addEventListener("focusin", (event) => {
      const word = this.#wordOf(event.target);
      if (word !== null && event.target.matches(":focus-visible")) on.enter(word);
    });
    place.addEventListener("focusout", () => on.leave());
  }

  clear() {
    this.place.replaceChildren();
    this.spans.clear();
    this.order = [];
  }

  // Adds text[start:stop] to an element, its words as spans under their numbers.
  add(element, text, words, start = 0, stop = text.length) {
    let done = start;
    words.forEach(([first, last], number) => {
      if (first < start || last > stop) return;
      element.append(text.slice(done, first));
      const span = document.createElement("span");
      span.className = "w";
      span.textContent = text.slice(first, last);
      span.dataset.word = number;
      span.setAttribute("role", "button");
      span.setAttribute("aria-pressed", "false");
      span.tabIndex = this.order.length ? -1 : 0;
      element.append(span);
      this.spans.set(number, span);
      this.order.push(number);
      done = last;
    });
    element.append(text.slice(done, stop));
  }

  // strengths: from 0 to 1 for each word number; the rest is unmarked.
  mark(strengths) {
    for (const [number, span] of this.spans) {
      const strength = strengths ? (strengths[number] ?? 0) : 0;
      span.style.setProperty("--a", strength > 0.03 ? strength.toFixed(4) : "0");
    }
  }

  single(here, pinned) {
    for (const [number, span] of this.spans) {
      span.classList.toggle("here", number === here);
      span.classList.toggle("pinned", number === pinned);
      span.setAttribute("aria-pressed", String(number === pinned));
    }
  }

  text(number) {
    return this.spans.get(number)?.textContent ?? "";
  }

  #wordOf(target) {
    const span = target.closest?.(".w");
    return span && this.place.contains(span) ? Number(span.dataset.word) : null;
  }

  #over(event) {
    const word = this.#wordOf(event.target);
    if (word === null) this.on.leave();
    else this.on.enter(word);
  }

  #click(event) {
    const word = this.#wordOf(event.target);
    if (word !== null) this.on.pin(word);
  }

  #key(event) {
    const word = this.#wordOf(event.target);
    if (word === null) return;
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Enter" || event.key === " ") this.on.pin(word);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") this.#toLine(word, event.key === "ArrowDown" ? 1 : -1);
    else if (step) this.#focus(Math.max(0, Math.min(this.order.length - 1, this.order.indexOf(word) + step)));
    else return;
    event.preventDefault();
  }

  #focus(place) {
    for (const span of this.spans.values()) span.tabIndex = -1;
    const span = this.spans.get(this.order[place]);
    span.tabIndex = 0;
    span.focus({ focusVisible: true });
  }

  // The word nearest in the line above or below.
  #toLine(word, direction) {
    const from = this.spans.get(word).getBoundingClientRect();
    const isBeyond = (box) => (direction > 0 ? box.top >= from.bottom - 2 : box.bottom <= from.top + 2);
    let best = null;
    this.order.forEach((number, place) => {
      const box = this.spans.get(number).getBoundingClientRect();
      if (!isBeyond(box)) return;
      const distance = Math.abs(box.top - from.top) * 100 + Math.abs(box.left - from.left);
      if (best === null || distance < best.distance) best = { distance, place };
    });
    if (best) this.#focus(best.place);
  }
}
