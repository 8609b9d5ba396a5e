// What the pages are put together from: notices, tables, dialogs, fields, chips. Every part is an element; none knows the API but
// by the Fault it is shown. Next: frame.js, views/.

import { fill, h, icon, said } from "./dom.js";
import { bytes, sentence } from "./format.js";

/** Say something to those who listen rather than look. */
export function announce(text) {
  const place = document.getElementById("said");
  place.textContent = "";
  requestAnimationFrame(() => {
    place.textContent = text;
  });
}

/** Return the head of a page: its name (focused when the page opens), what it is for, and what one does next. */
export function head(title, lead, { crumb, actions = [], chip } = {}) {
  return h(
    "header",
    { class: "head" },
    h(
      "div",
      {},
      crumb && h("a", { class: "crumb", href: crumb.href }, `← ${crumb.text}`),
      h("h1", { tabindex: "-1", dir: "auto" }, title),
      chip && h("div", { class: "row" }, chip),
      lead && h("p", { class: "lead" }, lead),
    ),
    actions.length > 0 && h("div", { class: "actions" }, actions),
  );
}

export function button(text, onClick, { kind = "", symbol, label, disabled, title, type = "button" } = {}) {
  return h(
    "button",
    { type, class: `button ${kind}`, on: onClick ? { click: onClick } : {}, "aria-label": label, disabled, title },
    symbol && icon(symbol),
    text,
  );
}

export function link(text, href, { kind = "", symbol } = {}) {
  return h("a", { class: `button ${kind}`, href }, text, symbol && icon(symbol));
}

/** Run `work` with a button shown busy; a second press meanwhile does nothing. */
export async function busy(element, work) {
  if (element.getAttribute("aria-disabled") === "true") return undefined;
  element.setAttribute("aria-disabled", "true");
  element.classList.add("busy");
  try {
    return await work();
  } finally {
    element.removeAttribute("aria-disabled");
    element.classList.remove("busy");
  }
}

export function notice(kind, title, ...content) {
  return h(
    "div",
    { class: `notice ${kind}`, role: kind === "bad" ? "alert" : null },
    title && h("p", { class: "title" }, title),
    content,
  );
}

/** Return a failure in words: what happened, what to do, the request's id, and a button where it may be tried again. */
export function failure(fault, retry) {
  return notice(
    "bad",
    sentence(fault.message),
    h("p", {}, fault.advice ?? "Reload the page. If it stays, tell the operator."),
    fault.request && h("p", { class: "small soft" }, "Request ", h("code", {}, fault.request)),
    retry && h("div", { class: "row" }, button("Try again", retry, { kind: "slim" })),
  );
}

export function empty(symbol, title, text, action) {
  return h("div", { class: "empty" }, icon(symbol), h("p", { class: "title" }, title), h("p", {}, text), action);
}

/** Return grey shapes of the size of what is being loaded, so that nothing jumps when it comes. */
export function ghosts(number, height) {
  return Array.from({ length: number }, () => {
    const ghost = h("div", { class: "ghost", "aria-hidden": "true" });
    ghost.style.height = `${height}px`;
    return ghost;
  });
}

/** Load into `place`: ghosts first, then what `draw` makes of what `load` gives, or the failure with a button. */
export async function loaded(place, { load, draw, waiting = ghosts(3, 96), signal }) {
  fill(place, waiting);
  place.setAttribute("aria-busy", "true");
  try {
    const found = await load();
    if (!signal?.aborted) fill(place, draw(found));
  } catch (error) {
    if (signal?.aborted) return;
    fill(
      place,
      failure(error, () => loaded(place, { load, draw, waiting, signal })),
    );
  } finally {
    place.removeAttribute("aria-busy");
  }
}

/** Load a page's sections one after the other, each put below what is there already: nothing that is read moves.
 *  A section is its element (null: it is there) and what loads it. */
export async function inTurn(place, signal, ...sections) {
  for (const [section, load] of sections) {
    if (signal.aborted) return;
    if (section) place.append(section);
    await load();
  }
}

export function chip(text, kind = "", live = false) {
  return h("span", { class: `chip ${kind} ${live ? "live" : ""}` }, text);
}

const STATUS = {
  validating_files: ["Checking files", "info", true],
  queued: ["Queued", "info", false],
  running: ["Training", "good", true],
  pausing: ["Pausing", "warn", true],
  paused: ["Paused", "warn", false],
  succeeded: ["Succeeded", "good", false],
  failed: ["Failed", "bad", false],
  cancelled: ["Cancelled", "", false],
  uploaded: ["Being checked", "info", true],
  processed: ["Ready", "good", false],
  error: ["Has problems", "bad", false],
};

/** Return a status of a job or a file as a chip. One that is not known is shown by its own name. */
export function status(name) {
  const [text, kind, live] = STATUS[name] ?? [name, "", false];
  return chip(text, kind, live);
}

export const statusText = (name) => (STATUS[name] ?? [name])[0];

export function tiles(pairs) {
  return h(
    "dl",
    { class: "tiles" },
    pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

export function facts(pairs) {
  return h(
    "dl",
    { class: "facts" },
    pairs.filter(Boolean).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
  );
}

/** Return a table that folds to a list of cards on a phone. `columns`: {name, cell(row), lead, end, fit}. */
export function table(caption, columns, rows) {
  const css = (column) => [column.lead && "lead", column.end && "end", column.fit && "fit"].filter(Boolean).join(" ") || null;
  return h(
    "table",
    { class: "table folds" },
    h("caption", { class: "unseen" }, caption),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        columns.map((column) =>
          h("th", { scope: "col", class: css(column) }, column.hidden ? h("span", { class: "unseen" }, column.name) : column.name),
        ),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map((row) =>
        h(
          "tr",
          {},
          columns.map((column) =>
            h("td", { class: css(column), "data-name": column.hidden ? null : column.name }, column.cell(row)),
          ),
        ),
      ),
    ),
  );
}

export function track(share, { label, kind = "" } = {}) {
  const bar = h("div", {});
  const shown = h(
    "div",
    { class: `track ${kind}`, role: "progressbar", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "100" },
    bar,
  );
  shown.set = (now) => {
    const percent = Math.max(0, Math.min(100, now * 100));
    bar.style.width = `${percent}%`;
    shown.setAttribute("aria-valuenow", String(Math.round(percent)));
  };
  shown.set(share);
  return shown;
}

let fieldCount = 0;

/** Return a field: label, control, help, and the place where what is wrong with it is said (`field.wrong("...")`). */
export function field(label, control, { help, hideLabel } = {}) {
  fieldCount += 1;
  const id = (control.id ||= `field-${fieldCount}`);
  const wrong = h("p", { class: "wrong", id: `${id}-wrong`, hidden: true });
  control.setAttribute("aria-describedby", help ? `${id}-help ${id}-wrong` : `${id}-wrong`);
  const whole = h(
    "div",
    { class: "field" },
    h("label", { for: id, class: hideLabel ? "unseen" : null }, label),
    control,
    help && h("p", { class: "help", id: `${id}-help` }, help),
    wrong,
  );
  whole.control = control;
  whole.wrong = (text) => {
    wrong.textContent = text ?? "";
    wrong.hidden = !text;
    if (text) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
  };
  control.addEventListener("input", () => whole.wrong(null));
  return whole;
}

export function select(options, value, props = {}) {
  const made = h(
    "select",
    props,
    options.map((option) => (option.group ? h("optgroup", { label: option.group }, option.options.map(one)) : one(option))),
  );
  function one(option) {
    return h("option", { value: option.value, disabled: option.disabled ?? false, selected: option.value === value }, option.text);
  }
  return made;
}

/** Open a dialog; resolves when it is closed. `build(close)` gives its content; the browser keeps the focus in it meanwhile. */
export function dialog(title, build) {
  return new Promise((resolve) => {
    const shown = h("dialog", { "aria-labelledby": "dialog-title" });
    const close = (value) => {
      shown.returned = value;
      shown.close();
    };
    fill(shown, h("div", { class: "stack" }, h("h2", { id: "dialog-title" }, title), build(close)));
    shown.addEventListener("close", () => {
      shown.remove();
      resolve(shown.returned);
    });
    document.body.append(shown);
    shown.showModal();
  });
}

/** Ask before something that cannot be undone. `act` runs with the dialog open, so that its failure is told there. */
export function confirmed(title, text, verb, act) {
  return dialog(title, (close) => {
    const place = h("div", {});
    const yes = button(
      verb,
      () =>
        busy(yes, async () => {
          try {
            close((await act()) ?? true);
          } catch (error) {
            fill(place, failure(error));
          }
        }),
      { kind: "first danger" },
    );
    return [
      h("p", {}, text),
      place,
      h(
        "div",
        { class: "buttons" },
        button("Keep it", () => close(false)),
        yes,
      ),
    ];
  });
}

/** Return a text with a button that copies it. */
export function copyable(text, label) {
  const code = h("code", {}, text);
  const copy = button(
    "Copy",
    async () => {
      copy.lastChild.textContent = (await copied(text, code)) ? "Copied" : "Press Ctrl+C";
      announce(copy.lastChild.textContent);
      setTimeout(() => {
        copy.lastChild.textContent = "Copy";
      }, 2000);
    },
    { kind: "slim", symbol: "copy", label: `Copy ${label}` },
  );
  return h("div", { class: "copyable" }, code, copy);
}

async function copied(text, element) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Only pages by https or on this machine may use the clipboard: the text is marked instead.
    getSelection().selectAllChildren(element);
    return false;
  }
}

/** Return what is said to a key that lacks a scope; null for one that has it. */
export function lacking(session, scope, what) {
  return session.may(scope)
    ? null
    : notice(
        "warn",
        `This key cannot ${what}`,
        h(
          "p",
          {},
          "It lacks the scope ",
          h("code", {}, scope),
          ". Sign in with a key that has it, or ask whoever gave you the key.",
        ),
      );
}

/** Return a file's name and what is told beside it. */
export function fileName(file) {
  return h("span", {}, said(file.filename, { class: "file-name" }), " ", h("span", { class: "soft small" }, bytes(file.bytes)));
}
