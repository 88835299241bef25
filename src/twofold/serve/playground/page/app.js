// The page: what is asked, of whom, and what is shown.

import { Answer } from "./answer.js";
import { get, inWords, post, useKey } from "./api.js";
import { readText } from "./files.js";
import { Lens } from "./lens.js";
import { Reading } from "./reading.js";
import { asMessages, compose, EXAMPLE, TASKS } from "./tasks.js";

const find = (id) => document.getElementById(id);
const instructions = new Map(TASKS.map((task) => [task.id, task.instruction]));
let task = TASKS[0];
let models = [];
let answers = [];

const reading = new Reading(find("reading"), find("ticks"), {
  enter: (word) => lens.point({ side: "source", word }), leave: () => lens.point(null), pin: (word) => lens.pin({ side: "source", word }),
});
const lens = new Lens(reading, () => answers);

// Tasks and the instruction.

function chooseTask(chosen) {
  task = chosen;
  find("instruction").value = instructions.get(task.id);
  find("instruction-label").textContent = task.label ?? "Instruction";
  find("instruction").placeholder = task.id === "chat" ? "Say something. A document is not needed." : "";
  find("json-row").hidden = !task.json;
  for (const answer of answers) answer.history = [];
  find("fresh").hidden = true;
  edit();
}

for (const one of TASKS) {
  const label = document.createElement("label");
  const radio = Object.assign(document.createElement("input"), { type: "radio", name: "task", value: one.id, checked: one === task });
  radio.addEventListener("change", () => chooseTask(one));
  label.append(radio, one.name);
  find("tasks").append(label);
}
find("instruction").addEventListener("input", () => {
  instructions.set(task.id, find("instruction").value);
  count();
});

// The document.

function setDocument(text) {
  find("document").value = text;
  edit();
  count();
}

function edit() {
  find("frame").hidden = true;
  find("document").hidden = false;
  find("edit").hidden = true;
  lens.close();
  for (const answer of answers) if (!answer.isBusy) answer.clear();
  count();
}

function showReading(answer) {
  find("document").hidden = true;
  find("frame").hidden = false;
  reading.show(answer.attention.source, answer.turns);
  find("edit").hidden = false;
  find("count").textContent = "as the model read it";
}

async function take(file) {
  const problem = find("file-problem");
  problem.hidden = true;
  try {
    setDocument(await readText(file));
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
  }
}

find("document").addEventListener("input", () => count());
find("edit").addEventListener("click", () => {
  edit();
  find("document").focus();
});
find("example").addEventListener("click", () => setDocument(EXAMPLE));
find("open").addEventListener("click", () => find("file").click());
find("file").addEventListener("change", () => {
  if (find("file").files.length) take(find("file").files[0]);
  find("file").value = "";
});
const drop = find("drop");
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.toggle("over", drop.contains(event.target));
});
document.addEventListener("dragleave", () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  const { files } = event.dataTransfer;
  const text = event.dataTransfer.getData("text/plain");
  if (files.length) take(files[0]);
  else if (text && drop.contains(event.target)) setDocument(text);
});

// How long it is, once typing rests.

let counting = 0;
function count() {
  clearTimeout(counting);
  find("example").hidden = find("document").value !== "";
  const words = find("document").value.match(/\S+/g)?.length ?? 0;
  const place = find("count");
  place.classList.remove("problem");
  place.textContent = words ? `${words.toLocaleString("en")} ${words === 1 ? "word" : "words"}` : "";
  if (!words || !answers.length) return;
  counting = setTimeout(async () => {
    const before = place.textContent;
    const messages = asMessages(compose(task, find("instruction").value, find("document").value, []));
    try {
      const { count: tokens, max_model_len: most } = await post("tokenize", { model: answers[0].model, messages });
      if (place.textContent !== before) return;
      place.textContent = `${before}, ${tokens.toLocaleString("en")} of ${most.toLocaleString("en")} tokens`;
      place.classList.toggle("problem", tokens >= most);
    } catch {
      // What is wrong is said when the question is asked.
    }
  }, 500);
}

// Asking.

async function run() {
  const texts = [find("instruction").value, find("document").value];
  if (!texts.some((text) => text.trim())) {
    find("document").focus();
    return;
  }
  lens.close();
  reading.mark(null);
  bring(answers[0].section, "end");
  const options = task.json && find("json").checked ? { response_format: { type: "json_object" } } : {};
  const isChat = task.id === "chat";
  await Promise.all(answers.map(async (answer) => {
    const turns = compose(task, ...texts, isChat ? answer.history : []);
    const isDone = await answer.run(turns, options);
    if (isChat && isDone && answer.text) answer.next = [...turns, { role: "assistant", content: answer.text }];
  }));
}

// On a narrow screen, where not everything is in sight.
function bring(element, block) {
  if (matchMedia("(max-width: 59.99rem)").matches) element.scrollIntoView({ block });
}

// In a conversation, the answer that is there joins the thread when the next message is sent.
function say() {
  if (task.id === "chat") {
    for (const answer of answers) {
      if (answer.next) answer.history = answer.next;
      answer.next = null;
    }
  }
  run();
}

function stop() {
  for (const answer of answers) answer.stop();
}

function changed() {
  const isBusy = answers.some((answer) => answer.isBusy);
  const hadFocus = [find("run"), find("stop")].includes(document.activeElement);
  find("run").hidden = isBusy;
  find("stop").hidden = !isBusy;
  if (hadFocus) find(isBusy ? "stop" : "run").focus();
  if (isBusy || task.id !== "chat") return;
  const isTalking = answers.some((answer) => answer.text);
  find("fresh").hidden = !isTalking;
  if (isTalking && find("instruction").value === answers[0].turns?.at(-1).parts[0].text) find("instruction").select();
}

find("run").addEventListener("click", say);
find("stop").addEventListener("click", stop);
find("fresh").addEventListener("click", () => {
  for (const answer of answers) Object.assign(answer, { history: [], next: null });
  find("fresh").hidden = true;
  edit();
  find("instruction").value = "";
  find("instruction").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!answers.some((answer) => answer.isBusy)) say();
  } else if (event.key === "Escape") {
    if (answers.some((answer) => answer.isBusy)) stop();
    else lens.pin(null);
  }
});

// One answer, or two.

function addAnswer(side) {
  const answer = new Answer(side, models, {
    enter: (from, word) => lens.point({ side: from, word }),
    leave: () => lens.point(null),
    pin: (from, word) => lens.pin({ side: from, word }),
    changed,
    key: () => askForKey(),
    attention: (from) => {
      const first = answers.find((one) => one.attention);
      if (first.side === from) showReading(first);
      lens.open();
      bring(drop, "start");
    },
  });
  answers.push(answer);
  find("answers").append(answer.section);
  return answer;
}

find("compare").addEventListener("click", () => {
  const isOn = document.body.classList.toggle("comparing");
  find("compare").setAttribute("aria-pressed", String(isOn));
  if (isOn) {
    const second = addAnswer("b");
    if (models.length < 2) second.openSettings();
  } else {
    const second = answers.pop();
    second.stop();
    second.section.remove();
    lens.open();
  }
});

// Light or dark: as the system has it, unless it was chosen here.

const system = matchMedia("(prefers-color-scheme: dark)");
function remembered() {
  try {
    return localStorage.getItem("twofold-theme");
  } catch {
    return null; // storage is blocked: the choice lasts as long as the page
  }
}
function applyTheme(chosen) {
  const theme = chosen ?? (system.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  find("theme").textContent = theme === "dark" ? "Light" : "Dark";
  find("theme").setAttribute("aria-label", `Change to ${theme === "dark" ? "light" : "dark"} colours`);
}
find("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("twofold-theme", theme);
  } catch {
    // As above.
  }
  applyTheme(theme);
});
system.addEventListener("change", () => applyTheme(remembered()));
applyTheme(remembered());

// The server: its models, and its key if it wants one.

function askForKey(isWrong = false) {
  find("access").hidden = false;
  find("access").querySelector("label").textContent = isWrong ? "The server does not know this key. Another one?" : "This server wants an API key.";
  find("key").focus();
}

async function connect() {
  try {
    models = (await get("v1/models")).data;
  } catch (error) {
    if (error.status === 401) {
      askForKey(find("key").value !== "");
      return;
    }
    find("answers").replaceChildren(Object.assign(document.createElement("p"), { className: "answer problem", textContent: inWords(error) }));
    setTimeout(connect, 3000);
    return;
  }
  find("access").hidden = true;
  find("answers").replaceChildren();
  answers = [];
  addAnswer("a");
  if (document.body.classList.contains("comparing")) addAnswer("b");
  count();
}
find("access").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(find("key").value);
  connect();
});

chooseTask(task);
connect();
