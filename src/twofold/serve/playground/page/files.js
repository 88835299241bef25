// Text files that are dropped or opened; a clear word on what is none.

const MOST_BYTES = 2_000_000;
const KNOWN = {
  pdf: "a PDF", doc: "a Word document", docx: "a Word document", odt: "an OpenDocument text", rtf: "an RTF document",
  xls: "a spreadsheet", xlsx: "a spreadsheet", ppt: "a presentation", pptx: "a presentation", epub: "an e-book",
  zip: "an archive", gz: "an archive", png: "a picture", jpg: "a picture", jpeg: "a picture", gif: "a picture",
  webp: "a picture", mp3: "a recording", wav: "a recording", mp4: "a film",
};

export async function readText(file) {
  const kind = KNOWN[file.name.split(".").pop().toLowerCase()];
  if (kind) throw new Error(`“${file.name}” is ${kind}. Only plain text can be read here: copy its text and paste it.`);
  if (file.size > MOST_BYTES) {
    const megabytes = (file.size / 1e6).toFixed(1);
    throw new Error(`“${file.name}” has ${megabytes} MB, more than a model can read at once. Cut out the part you need.`);
  }
  if (file.size === 0) throw new Error(`“${file.name}” is empty.`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  try {
    const text = new TextDecoder(encodingOf(bytes), { fatal: true }).decode(bytes);
    if (text.includes("\0")) throw new TypeError();
    return text.replace(/\r\n?/g, "\n");
  } catch {
    throw new Error(`“${file.name}” is not text in UTF-8 or UTF-16. Save it as UTF-8 text, or copy its text and paste it.`);
  }
}

function encodingOf(bytes) {
  if (bytes[0] === 0xff && bytes[1] === 0xfe) return "utf-16le";
  if (bytes[0] === 0xfe && bytes[1] === 0xff) return "utf-16be";
  return "utf-8";
}
