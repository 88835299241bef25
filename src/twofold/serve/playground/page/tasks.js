// What can be asked, and the words it is asked with. All of them may be edited in the page.

export const TASKS = [
  { id: "summarise", name: "Summarise", instruction: "Summarise the text in two sentences." },
  { id: "translate", name: "Translate", instruction: "Translate the text into German." },
  { id: "ask", name: "Ask", instruction: "Answer from the text alone: what happened, and when?" },
  {
    id: "extract", name: "Extract JSON", json: true,
    instruction: 'List what the text names, as JSON: {"people": [], "places": [], "dates": [], "amounts": []}',
  },
  { id: "chat", name: "Chat", label: "Message", instruction: "" },
];

export const EXAMPLE = `The Harbour Bridge reopens

Engineers reopened the Harbour Bridge in Aberlith on Tuesday morning, nine weeks after a routine inspection found cracks in two of its suspension cables. The repair cost 4.2 million pounds, about half of what the city council had set aside in June.

Maren Okafor, who led the work, said that her team replaced eleven steel clamps and wrapped both cables in a new coating that keeps out salt water. "The old coating was designed for a drier climate," she said. "We now expect the cables to last another forty years."

Ferries carried about 18,000 passengers a day while the bridge was closed, twice as many as in an ordinary summer. The ferry company will keep three of its extra boats until October, because the road on the northern side is still limited to one lane. Cyclists, who make up a fifth of all traffic, may use the eastern footpath from Friday on.

Shop owners on Quay Street asked the council for compensation after sales fell by a third. A decision is expected at the meeting on 14 September.`;

// Messages as the API takes them, and the parts they are made of, to find them again in what the model read.
export function compose(task, instruction, text, history) {
  const parts = [];
  const isFirst = history.length === 0;
  if (instruction.trim()) parts.push({ kind: "prompt", label: task.label ?? "Instruction", text: instruction.trim() });
  if (isFirst && text.trim()) parts.push({ kind: "document", label: "Document", text: text.trim() });
  const turn = { role: "user", content: parts.map((part) => part.text).join("\n\n"), parts };
  return [...history, turn];
}

export function asMessages(turns) {
  return turns.map(({ role, content }) => ({ role, content }));
}

// For models without a chat template.
export function asText(turns) {
  return turns.map((turn) => turn.content).join("\n\n");
}
