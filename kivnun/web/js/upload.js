// Files to the service: small ones in one request, big ones in parts, both with progress (XMLHttpRequest tells how many bytes are
// out; fetch does not). A part that the network lost is sent again. Next: views/data.js.

import { Fault, address, authorization, call, faultOf, post } from "./api.js";

export const PART_BYTES = 64 * 1024 * 1024;
const TRIES = 4;

/** Send a file; return the file object. `progress(bytes)` hears how much is out. Raises Fault, AbortError. */
export async function uploaded(file, purpose, progress, signal) {
  return file.size > PART_BYTES ? inParts(file, purpose, progress, signal) : whole(file, purpose, progress, signal);
}

async function whole(file, purpose, progress, signal) {
  const form = new FormData();
  form.append("purpose", purpose);
  form.append("file", file, file.name);
  return sent("files", form, (out, total) => progress(total ? Math.round((out / total) * file.size) : out), signal);
}

async function inParts(file, purpose, progress, signal) {
  const upload = await post(
    "uploads",
    { filename: file.name, purpose, bytes: file.size, mime_type: "application/jsonl" },
    { signal },
  );
  try {
    const part_ids = [];
    for (let start = 0; start < file.size; start += PART_BYTES) {
      const form = new FormData();
      form.append("data", file.slice(start, start + PART_BYTES), "part");
      const part = await again(() =>
        sent(`uploads/${upload.id}/parts`, form, (out) => progress(Math.min(file.size, start + out)), signal),
      );
      part_ids.push(part.id);
    }
    return (await post(`uploads/${upload.id}/complete`, { part_ids }, { signal })).file;
  } catch (error) {
    call("POST", `uploads/${upload.id}/cancel`).catch(() => {}); // Else its parts are kept for an hour.
    throw error;
  }
}

async function again(attempt) {
  for (let tried = 1; ; tried += 1) {
    try {
      return await attempt();
    } catch (error) {
      const passing = error instanceof Fault && (error.status === 0 || error.status === 429 || error.status >= 500);
      if (!passing || tried === TRIES) throw error;
      await new Promise((wake) => setTimeout(wake, error.wait ?? 500 * 2 ** tried));
    }
  }
}

function sent(path, form, progress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", address(path));
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => progress(event.loaded, event.lengthComputable ? event.total : 0);
    request.onload = () => {
      if (request.status >= 200 && request.status < 300) return resolve(JSON.parse(request.responseText));
      const fault = faultOf(request.status, request.responseText, (name) => request.getResponseHeader(name));
      if (fault.status === 401) document.dispatchEvent(new CustomEvent("kivnun:refused", { detail: fault }));
      return reject(fault);
    };
    request.onerror = () => reject(new Fault(0, "The upload broke off."));
    request.onabort = () => reject(new DOMException("The upload was stopped.", "AbortError"));
    if (signal?.aborted) return request.onabort();
    signal?.addEventListener("abort", () => request.abort(), { once: true });
    return request.send(form);
  });
}
