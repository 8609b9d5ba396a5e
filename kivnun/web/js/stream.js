// Answers as they come: server-sent events read from a fetch, because EventSource can send neither a key nor a body. Next: api.js.

import { Fault, send } from "./api.js";

/** Give each object that the service streams in answer to `body`. Raises Fault for a failure in the middle too. */
export async function* streamed(path, body, signal) {
  const response = await send("POST", path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let rest = "";
    for (;;) {
      const { value, done } = await read(reader);
      if (done) throw new Fault(0, "The answer broke off before its end.");
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = dataOf(block);
        if (data === "[DONE]") return;
        if (data === null) continue;
        const object = JSON.parse(data);
        if (object.error)
          throw new Fault(500, object.error.message, { code: object.error.code, request: response.headers.get("x-request-id") });
        yield object;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault(0, "The connection was lost in the middle of the answer.");
  }
}

/** Return the data of one event; null for a comment. */
function dataOf(block) {
  const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.length ? lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n") : null;
}
