// Where the pages begin: signed in or not, and which page the address asks for. A page is a function that fills a place; when one
// leaves it, its requests and timers end by its signal. Next: frame.js (what stands around), views/ (the pages), api.js.

import { get, session } from "./api.js";
import { fill, h } from "./dom.js";
import { sentence } from "./format.js";
import { drawFrame, markStep } from "./frame.js";
import { button, failure } from "./parts.js";
import { catalogue } from "./views/catalogue.js";
import { data, report } from "./views/data.js";
import { job } from "./views/job.js";
import { jobs } from "./views/jobs.js";
import { keys } from "./views/keys.js";
import { playground } from "./views/playground.js";
import { signIn } from "./views/signin.js";
import { tune } from "./views/tune.js";

const PAGES = {
  catalogue: { view: catalogue, title: "Catalogue" },
  data: { view: data, one: report, title: "Data" },
  tune: { view: tune, title: "Parameters" },
  jobs: { view: jobs, one: job, title: "Jobs" },
  playground: { view: playground, title: "Playground" },
  keys: { view: keys, title: "Keys and usage" },
};

const frame = document.getElementById("frame");
let leaving = new AbortController();
let outlet = null;

/** Return what the address names: a page, the id of one thing, and what was handed over. */
function asked() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...id] = path.split("/");
  return {
    name: name in PAGES ? name : "catalogue",
    id: id.length ? decodeURIComponent(id.join("/")) : null,
    query: new URLSearchParams(query),
  };
}

function show({ focus }) {
  leaving.abort();
  leaving = new AbortController();
  const { name, id, query } = asked();
  const page = PAGES[name];
  const { signal } = leaving;
  document.title = `${page.title} · Kivnun`;
  markStep(frame, name);
  const place = h("div", { class: "page" });
  fill(outlet, place);
  (id !== null && page.one ? page.one : page.view)({ place, id, query, signal, every: (ms, work) => every(ms, work, signal) });
  if (focus) {
    scrollTo(0, 0);
    (place.querySelector("h1") ?? outlet).focus({ preventScroll: true });
  }
}

/** Do `work` every `ms` until the page is left. It waits while the tab is hidden, and longer after each failure. */
async function every(ms, work, signal) {
  for (let wait = ms; !signal.aborted;) {
    await new Promise((wake) => {
      const timer = setTimeout(wake, wait);
      signal.addEventListener(
        "abort",
        () => {
          clearTimeout(timer);
          wake();
        },
        { once: true },
      );
    });
    if (signal.aborted) return;
    if (document.hidden) continue;
    try {
      if ((await work()) === "enough") return;
      wait = ms;
    } catch (error) {
      if (signal.aborted || error.status === 401) return;
      wait = Math.min(30_000, Math.max(wait * 2, error.wait ?? 0));
    }
  }
}

async function begin(said) {
  leaving.abort();
  outlet = null;
  if (!session.key) return signIn(frame, begin, said);
  try {
    session.me = await get("x_me");
  } catch (error) {
    if (error.status === 401) return refused(error);
    const out = button(
      "Sign out",
      () => {
        session.signOut();
        begin();
      },
      { kind: "slim" },
    );
    return fill(
      frame,
      h(
        "main",
        { id: "content" },
        h(
          "div",
          { class: "page" },
          failure(error, () => begin()),
          h("div", {}, out),
        ),
      ),
    );
  }
  outlet = drawFrame(frame, () => {
    session.signOut();
    begin("You are signed out. The key is no longer in this tab.");
  });
  show({ focus: false });
  return undefined;
}

function refused(fault) {
  session.signOut();
  return begin(sentence(fault.message));
}

addEventListener("hashchange", () => {
  if (outlet) show({ focus: true });
});
// A key may be revoked or expire while its pages are open: whichever request hears of it first leads to the sign-in.
document.addEventListener("kivnun:refused", (event) => {
  if (outlet) refused(event.detail);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  // The address belongs to the pages: it stays as it is.
  event.preventDefault();
  document.getElementById("content")?.focus();
});
begin();
