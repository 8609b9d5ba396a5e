// Elements are made here and nowhere else. Whatever people or models wrote goes in as a text node, never as markup: there is no
// call in these pages that reads HTML out of a string, and the Content-Security-Policy's Trusted Types would stop one.
// Next: parts.js (what elements are put together to).

const SVG = "http://www.w3.org/2000/svg";

/** Return an element. `props`: attributes by name; `on` holds listeners; true sets an empty attribute, false and null none. */
export function h(tag, props = {}, ...children) {
  return filled(document.createElement(tag), props, children);
}

/** Return an SVG element. */
export function s(tag, props = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), props, children);
}

function filled(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "selected") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  put(element, ...children);
  return element;
}

/** Add children: elements, texts, numbers, lists of them; null and false are left out. */
export function put(parent, ...children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    parent.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return parent;
}

/** Put children in the place of all that is in `parent`. */
export function fill(parent, ...children) {
  parent.replaceChildren();
  return put(parent, ...children);
}

/** Text that somebody wrote: it has a direction of its own, whatever stands around it. */
export function said(text, props = {}) {
  return h("bdi", props, text);
}

const PATHS = {
  catalogue: "M3.5 4.5h5v5h-5zM11.5 4.5h5v5h-5zM3.5 12.5h5v5h-5zM11.5 15h5M14 12.5v5",
  data: "M10 13.5v-9M6.5 8 10 4.5 13.5 8M4 13v3.5h12V13",
  tune: "M4 6.5h7M15 6.5h1M4 13.5h1M9 13.5h7M13 4.5v4M7 11.5v4",
  jobs: "M3.5 16.5v-12M3.5 16.5h13M6 8c2.5.5 2.5 5 5 5.5s3 1 5.5.5",
  play: "M4 5h12v8.5H9.5L6 16.5v-3H4z",
  keys: "M12.5 4a3.7 3.7 0 1 0 .1 0M9.9 10.2 4 16.2M5.8 14.4l2 2",
  sun: "M10 6.5a3.5 3.5 0 1 0 .1 0M10 2v1.5M10 16.5V18M2 10h1.5M16.5 10H18M4.4 4.4l1 1M14.6 14.6l1 1M15.6 4.4l-1 1M5.4 14.6l-1 1",
  moon: "M15.8 12.2A6.5 6.5 0 0 1 7.8 4.2a6.5 6.5 0 1 0 8 8z",
  auto: "M10 3a7 7 0 1 0 .1 0M10 3v14",
  out: "M8 4H4v12h4M8.5 10H16M13 7l3 3-3 3",
  copy: "M7 7h9v9H7zM13 7V4H4v9h3",
  down: "M10 4v9M6.5 9.5 10 13l3.5-3.5M4 16.5h12",
  bin: "M4 6h12M8 6V4h4v2M6 6l.7 10.5h6.6L14 6M8.7 9v5M11.3 9v5",
  arrow: "M4 10h11M11 6l4 4-4 4",
  plus: "M10 4.5v11M4.5 10h11",
  check: "M4.5 10.5 8 14l7.5-8",
  stop: "M6 6h8v8H6z",
  send: "M4 10h11M10 5l5 5-5 5",
};

/** Return one of the drawings above, for the eye alone. */
export function icon(name) {
  return s(
    "svg",
    {
      viewBox: "0 0 20 20",
      fill: "none",
      stroke: "currentColor",
      "stroke-width": "1.7",
      "stroke-linecap": "round",
      "stroke-linejoin": "round",
      "aria-hidden": "true",
    },
    s("path", { d: PATHS[name] }),
  );
}
