// The server's routes, and what went wrong with them in words.

let key = "";

export function useKey(value) {
  key = value.trim();
}

export class Refused extends Error {
  constructor(status, message, code, retryAfter) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

async function call(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "no connection");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  const { message = response.statusText, code = null } = said.error ?? {};
  const seconds = Number(response.headers.get("Retry-After"));
  throw new Refused(response.status, message, code, seconds > 0 ? seconds : null);
}

export async function get(path) {
  return (await call(path)).json();
}

export async function post(path, body, signal) {
  return (await call(path, body, signal)).json();
}

// Calls onEvent with the JSON of every server-sent event.
export async function stream(path, body, signal, onEvent) {
  const response = await call(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(0, "the connection broke");
    }
    if (piece.done) throw new Refused(0, "the connection ended before the answer did");
    waiting += piece.value;
    const lines = waiting.split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.code === "timeout" ? 504 : 500, event.error.message, event.error.code);
      onEvent(event);
    }
  }
}

export function inWords(error) {
  if (!(error instanceof Refused)) return `The page failed: ${error.message}.`;
  const message = sentence(error.message);
  if (error.status === 0) return `The server does not answer (${error.message}). Is it still running?`;
  if (error.status === 401) return "The server does not know this API key.";
  if (error.status === 413 || error.code === "context_length_exceeded") return `Too long. ${message}`;
  if (error.status === 429) return "The server is busy.";
  if (error.status === 503) return `The server takes no requests now. ${message}`;
  if (error.status === 504) return `It took too long. ${message}`;
  if (error.status >= 500) return `The server failed. ${message}`;
  return message;
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
