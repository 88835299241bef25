// One answer: its settings, its stream, its words, and the attention behind them.

import { inWords, Refused, stream } from "./api.js";
import { Attention } from "./attention.js";
import { asMessages, asText } from "./tasks.js";
import { WordText } from "./words.js";

const WITHOUT_TEMPLATE = new Set(); // models whose tokenizer has no chat template: they get plain text

export class Answer {
  // on: {enter(side, i), leave(), pin(side, i), changed(side), attention(side), key(error)}
  constructor(side, models, on) {
    const section = document.getElementById("answer").content.firstElementChild.cloneNode(true);
    Object.assign(this, { side, on, section, history: [], text: "", attention: null, controller: null });
    section.classList.add(side);
    section.setAttribute("aria-label", side === "a" ? "Answer" : "Second answer");
    this.words = new WordText(this.#find(".text"), {
      enter: (word) => on.enter(side, word), leave: on.leave, pin: (word) => on.pin(side, word),
    });
    this.#find(".text").dataset.empty = side === "a" ? "The answer appears here. Then point at one of its words, and see what the model looked at in the document." : "";
    const select = this.#find(".model");
    select.replaceChildren(...models.map((model) => new Option(model.id)));
    select.disabled = models.length < 2;
    if (side === "b" && models.length > 1) select.selectedIndex = 1;
    select.addEventListener("change", () => on.changed(side));
    const shortest = Math.min(...models.map((model) => model.max_model_len));
    this.#find(".max-tokens").defaultValue = Math.max(1, Math.min(256, Math.floor(shortest / 4)));
    this.#settings();
    this.#find(".copy").addEventListener("click", () => this.#copy());
  }

  get model() {
    return this.#find(".model").value;
  }

  get isBusy() {
    return this.controller !== null;
  }

  openSettings() {
    this.#find(".settings").hidden = false;
    this.#find(".settings-button").setAttribute("aria-expanded", "true");
  }

  clear() {
    this.words.clear();
    this.text = "";
    this.attention = null;
    this.#find(".stats").textContent = "";
    this.#find(".copy").hidden = true;
    this.#problem(null);
    this.showHistory();
  }

  showHistory() {
    const thread = this.#find(".thread");
    thread.replaceChildren(...this.history.map((turn) => {
      const element = document.createElement("div");
      const heading = document.createElement("h3");
      heading.textContent = turn.role === "user" ? "You" : "Model";
      const text = document.createElement("div");
      text.className = "prose";
      text.textContent = turn.role === "user" ? turn.parts.filter((p) => p.kind === "prompt").map((p) => p.text).join("\n\n") || "(the document)" : turn.content;
      element.append(heading, text);
      return element;
    }));
    thread.scrollTop = thread.scrollHeight;
  }

  stop() {
    this.controller?.abort();
  }

  // Asks, streams, then fetches the attention. Returns whether there is an answer.
  async run(turns, options) {
    this.stop();
    this.clear();
    const controller = new AbortController();
    Object.assign(this, { controller, turns });
    this.section.classList.add("busy");
    this.on.changed(this.side);
    const clock = { start: performance.now(), ids: [] };
    let isComplete = false;
    try {
      await this.#stream(turns, options, controller.signal, clock);
      isComplete = true;
    } catch (error) {
      if (error.name !== "AbortError") this.#problem(error, () => this.run(turns, options));
    }
    if (this.controller !== controller) return false; // asked again meanwhile
    this.controller = null;
    this.section.classList.remove("busy");
    this.#stats(clock, isComplete);
    this.#find(".copy").hidden = !this.text;
    this.on.changed(this.side);
    if (this.text && clock.ids.length) await this.#attend(clock.ids);
    return isComplete;
  }

  async #stream(turns, options, signal, clock) {
    const isChat = !WITHOUT_TEMPLATE.has(this.model);
    const body = { model: this.model, return_token_ids: true, ...this.#asked(), ...(isChat ? options : {}) };
    this.asked = { model: this.model, ...(isChat ? { messages: asMessages(turns) } : { prompt: asText(turns) }) };
    const place = this.#find(".text");
    const take = (event) => {
      const choice = event.choices?.[0];
      if (!choice) return;
      clock.ids.push(...(choice.token_ids ?? []));
      const text = (isChat ? choice.delta?.content : choice.text) ?? "";
      if (!text) return;
      clock.first ??= { at: performance.now(), tokens: clock.ids.length };
      clock.last = performance.now();
      this.text += text;
      const follows = place.scrollHeight - place.scrollTop - place.clientHeight < 40;
      place.append(text);
      if (follows) place.scrollTop = place.scrollHeight;
      this.#stats(clock, false);
    };
    try {
      await stream(isChat ? "v1/chat/completions" : "v1/completions", { ...body, ...this.asked }, signal, take);
    } catch (error) {
      if (!(isChat && error instanceof Refused && error.status === 400 && /has no chat template/.test(error.message) && !this.text)) throw error;
      WITHOUT_TEMPLATE.add(this.model);
      await this.#stream(turns, options, signal, clock);
    }
  }

  async #attend(ids) {
    const attention = new Attention(this.asked, ids);
    const stats = this.#find(".stats");
    const before = stats.textContent;
    stats.textContent = `${before} · reading its attention…`;
    try {
      await attention.load();
    } catch (error) {
      stats.textContent = `${before} · attention not shown: ${inWords(error)}`;
      return;
    }
    if (this.asked !== undefined && attention.asked.messages !== this.asked.messages) return;
    stats.textContent = before;
    // A stop string is part of the tokens, and not of the answer.
    const words = attention.answer.words.filter(([, stop]) => stop <= this.text.length);
    if (!attention.answer.text.startsWith(this.text)) return;
    this.attention = attention;
    this.words.clear();
    this.words.add(this.#find(".text"), this.text, words);
    this.on.attention(this.side);
  }

  #asked() {
    const value = (name) => this.#find(name).value;
    const beams = Number(value(".beams"));
    const stops = value(".stops").split("|").map((text) => text.replaceAll("\\n", "\n")).filter(Boolean);
    return {
      max_tokens: Number(value(".max-tokens")),
      ...(beams > 1 ? { num_beams: beams } : { temperature: Number(value(".temperature")) }),
      ...(value(".seed") === "" ? {} : { seed: Number(value(".seed")) }),
      ...(stops.length ? { stop: stops } : {}),
    };
  }

  #settings() {
    const button = this.#find(".settings-button");
    const panel = this.#find(".settings");
    panel.id = `settings-${this.side}`;
    button.setAttribute("aria-controls", panel.id);
    button.addEventListener("click", () => {
      panel.hidden = !panel.hidden;
      button.setAttribute("aria-expanded", String(!panel.hidden));
    });
    const temperature = this.#find(".temperature");
    temperature.addEventListener("input", () => (temperature.nextElementSibling.textContent = temperature.value));
    const beams = this.#find(".beams");
    beams.addEventListener("input", () => {
      temperature.disabled = Number(beams.value) > 1;
      this.#find(".beams-hint").hidden = !temperature.disabled;
    });
    for (const input of panel.querySelectorAll("input[type=number]")) {
      input.addEventListener("change", () => {
        if (!input.checkValidity() || (input.value === "" && !input.placeholder)) input.value = input.defaultValue;
      });
    }
  }

  #stats(clock, isComplete) {
    const parts = [];
    if (clock.first) {
      const seconds = (clock.last - clock.first.at) / 1000;
      const tokens = clock.ids.length - clock.first.tokens;
      parts.push(`first word ${((clock.first.at - clock.start) / 1000).toFixed(2)} s`);
      if (tokens > 0 && seconds > 0) parts.push(`${(tokens / seconds).toFixed(1)} tokens/s`);
      parts.push(`${clock.ids.length} tokens`);
    } else if (isComplete) {
      parts.push("The model ended without writing anything");
    }
    if (!this.isBusy && !isComplete && clock.first) parts.push("stopped");
    this.#find(".stats").textContent = parts.join(" · ");
  }

  #problem(error, again) {
    const place = this.#find(".problem");
    clearInterval(this.timer);
    place.hidden = error === null;
    if (error === null) return;
    if (error.status === 401) this.on.key(error);
    place.textContent = inWords(error);
    if (![0, 429, 503, 504].includes(error.status)) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "quiet";
    button.addEventListener("click", again);
    place.append(button);
    let seconds = error.retryAfter ?? 0;
    const show = () => (button.textContent = seconds > 0 ? `Try again (by itself in ${seconds} s)` : "Try again");
    show();
    if (!seconds) return;
    this.timer = setInterval(() => {
      seconds -= 1;
      show();
      if (seconds <= 0) {
        clearInterval(this.timer);
        again();
      }
    }, 1000);
  }

  async #copy() {
    const button = this.#find(".copy");
    try {
      await navigator.clipboard.writeText(this.text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copying is not allowed here";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  #find(selector) {
    return this.section.querySelector(selector);
  }
}
