// What stands around every page: the steps from a base to a bill, as the flow that the service follows, and who is signed in.
// Next: views/catalogue.js (the first step).

import { session } from "./api.js";
import { fill, h, icon, said } from "./dom.js";
import { button, chip } from "./parts.js";
import { themeButton } from "./theme.js";

export const STEPS = [
  { name: "catalogue", icon: "catalogue", title: "Catalogue", what: "Choose a base", short: "Bases" },
  { name: "data", icon: "data", title: "Data", what: "Upload examples", short: "Data" },
  { name: "tune", icon: "tune", title: "Parameters", what: "See the plan, then start", short: "Plan" },
  { name: "jobs", icon: "jobs", title: "Jobs", what: "Watch it learn", short: "Jobs" },
  { name: "playground", icon: "play", title: "Playground", what: "Ask base and tuned", short: "Play" },
  { name: "keys", icon: "keys", title: "Keys and usage", what: "Access, cost, limits", short: "Keys" },
];

/** Draw the frame; return the element that pages are put into. */
export function drawFrame(frame, signOut) {
  const outlet = h("main", { id: "content", tabindex: "-1" });
  const out = (square) =>
    button(square ? null : "Sign out", signOut, {
      kind: square ? "plain square" : "slim",
      symbol: "out",
      label: "Sign out",
      title: "Sign out",
    });
  fill(
    frame,
    h(
      "div",
      { class: "frame" },
      h("header", { class: "topbar" }, brand(), h("div", { class: "row" }, themeButton(), out(true))),
      h(
        "div",
        { class: "rail" },
        brand(),
        h("nav", { "aria-label": "Steps" }, h("ol", { class: "flow" }, STEPS.map(step))),
        h(
          "div",
          { class: "who" },
          h("div", {}, h("div", { class: "small soft" }, "Tenant"), said(session.me.tenant, { class: "tenant" })),
          h(
            "div",
            { class: "row", "aria-label": "Scopes of this key" },
            session.me.key.scopes.map((scope) => chip(scope)),
          ),
          h("div", { class: "row" }, themeButton(), out(false)),
        ),
      ),
      outlet,
    ),
  );
  return outlet;
}

function brand() {
  return h("a", { class: "brand", href: "#/catalogue" }, h("img", { src: "icon.svg", alt: "", width: 28, height: 28 }), "Kivnun");
}

function step({ name, icon: symbol, title, what, short }) {
  return h(
    "li",
    {},
    h(
      "a",
      { href: `#/${name}`, "data-step": name },
      h("span", { class: "mark" }, icon(symbol)),
      h("span", { class: "name" }, title),
      h("span", { class: "what" }, what),
      h("span", { class: "short", "aria-hidden": "true" }, short),
    ),
  );
}

/** Mark which step is shown. */
export function markStep(frame, name) {
  for (const found of frame.querySelectorAll("[data-step]")) {
    if (found.dataset.step === name) found.setAttribute("aria-current", "page");
    else found.removeAttribute("aria-current");
  }
}
