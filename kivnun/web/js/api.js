// The one way to the service: its public API, called with the key of whoever is signed in. Every failure becomes a Fault, which
// knows what the service said and what to do about it. Next: upload.js (bytes with progress), stream.js (answers as they come).

const KEY = "kivnun.key";
const ROOT = new URL("v1/", document.baseURI);

/** The key of this tab: it is forgotten when the tab is closed, or by `signOut`. */
export const session = {
  me: null,
  get key() {
    return sessionStorage.getItem(KEY);
  },
  set key(given) {
    sessionStorage.setItem(KEY, given);
  },
  signOut() {
    sessionStorage.removeItem(KEY);
    this.me = null;
  },
  /** Whether the key may do what needs `scope`. */
  may(scope) {
    const scopes = this.me?.key.scopes ?? [];
    return scopes.includes(scope) || scopes.includes("admin");
  },
};

/** What the service, or the way to it, answered instead of what was asked for. */
export class Fault extends Error {
  constructor(status, message, { code = null, param = null, request = null, wait = null } = {}) {
    super(message);
    Object.assign(this, { name: "Fault", status, code, param, request, wait });
  }

  /** One sentence: what to do next. */
  get advice() {
    if (this.status === 0) return "Check that the service runs and that this machine reaches it, then try again.";
    if (this.status === 401) return "Sign in with a key that is valid.";
    if (this.status === 403) return "Sign in with a key that has this scope, or ask whoever gave you the key.";
    if (this.status === 404) return "It may have been deleted, or it belongs to another tenant.";
    if (this.status === 413) return "Split the file, or ask the operator for a higher limit.";
    if (this.status === 429)
      return `Wait ${this.wait ? Math.max(1, Math.ceil(this.wait / 1000)) + " s" : "a moment"}, then try again.`;
    if (this.status >= 500) return "Try again in a moment. If it stays, give the operator the request's id.";
    return "Change what is named above, and send it again.";
  }
}

/** Return the address of a path of the API, with a query. */
export function address(path, query = {}) {
  const url = new URL(path, ROOT);
  for (const [name, value] of Object.entries(query)) if (value !== null && value !== undefined) url.searchParams.set(name, value);
  return url;
}

export function authorization() {
  return { Authorization: `Bearer ${session.key}` };
}

/** Return the Fault that an answer's body tells of. */
export function faultOf(status, text, header) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // Something between here and the service answered, in words of its own.
  }
  const wait = Number(header("retry-after-ms")) || Number(header("retry-after")) * 1000 || null;
  return new Fault(status, error.message ?? `The service answered ${status}.`, {
    code: error.code,
    param: error.param,
    request: header("x-request-id"),
    wait,
  });
}

/** Send a request; return the response, whose status is 2xx. Raises Fault; an abort of `signal` passes as it is. */
export async function send(method, path, { query, body, headers = {}, signal } = {}) {
  let response;
  try {
    response = await fetch(address(path, query), {
      method,
      signal,
      cache: "no-store",
      headers: { ...authorization(), ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault(0, "The service does not answer.");
  }
  if (response.ok) return response;
  const fault = faultOf(response.status, await response.text(), (name) => response.headers.get(name));
  if (fault.status === 401) document.dispatchEvent(new CustomEvent("kivnun:refused", { detail: fault }));
  throw fault;
}

/** Send a request; return what its answer holds, read as JSON. */
export async function call(method, path, options) {
  return (await send(method, path, options)).json();
}

export const get = (path, query, signal) => call("GET", path, { query, signal });
export const post = (path, body, options = {}) => call("POST", path, { body, ...options });

/** Return a list page by page: all of it, to `most` items. */
export async function all(path, query, signal, most = 2000) {
  const found = [];
  for (let after; found.length < most; after = found.at(-1).id) {
    const page = await get(path, { ...query, after }, signal);
    found.push(...page.data);
    if (!page.has_more || page.data.length === 0) break;
  }
  return found;
}

/** Save what a path answers as a file of this machine. */
export async function download(path, filename, query, signal) {
  const blob = await (await send("GET", path, { query, signal })).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = filename;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Return 128 random bits in hexadecimal: a name for a request that may be sent twice. */
export function newName() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
