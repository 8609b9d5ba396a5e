// The last step: who may call the service, what they used, and what they may use at most. Next: frame.js.

import { call, get, post, session } from "../api.js";
import { fill, h, said } from "../dom.js";
import { ago, date } from "../format.js";
import {
  announce,
  button,
  busy,
  chip,
  confirmed,
  copyable,
  dialog,
  empty,
  failure,
  field,
  ghosts,
  head,
  inTurn,
  lacking,
  loaded,
  notice,
  select,
  table,
} from "../parts.js";
import { drawLimits, drawUsage } from "./usage.js";

const SCOPES = [
  ["read", "See everything of this tenant"],
  ["data", "Send and delete files"],
  ["tune", "Start, pause and cancel jobs; delete models"],
  ["chat", "Ask models"],
  ["admin", "All of it, and keys"],
];

export function keys({ place, signal }) {
  const list = h("div", {});
  const usage = h("div", {});
  const show = () =>
    loaded(list, {
      signal,
      waiting: ghosts(2, 64),
      load: () => get("x_keys", {}, signal),
      draw: ({ data }) => drawKeys(data, show),
    });
  const limits = h("div", {});
  const admin = session.may("admin");
  fill(
    place,
    head("Keys and usage", "Who may call this service, what was used and what it costs.", {
      actions: admin ? [button("New key", () => made(show), { kind: "first", symbol: "plus" })] : [],
    }),
    h("section", { class: "section" }, h("h2", {}, "Keys"), lacking(session, "admin", "make or revoke keys"), list),
  );
  inTurn(
    place,
    signal,
    [null, show],
    [usage, () => drawUsage(usage, signal)],
    [
      h("section", { class: "section" }, h("h2", {}, "Limits"), limits),
      () => loaded(limits, { signal, waiting: ghosts(1, 130), load: () => get("x_me", {}, signal), draw: drawLimits }),
    ],
  );
}

function drawKeys(keys, again) {
  if (!keys.length)
    return empty("keys", "No keys", "Make one for each program that calls the service, so that each can be revoked alone.");
  const sorted = [...keys].sort((a, b) => Boolean(a.revoked_at) - Boolean(b.revoked_at) || b.created_at - a.created_at);
  const gone = (key) => key.revoked_at || (key.expires_at && key.expires_at * 1000 < Date.now());
  return h(
    "div",
    { class: "card" },
    table(
      "Keys",
      [
        {
          name: "Name",
          lead: true,
          cell: (key) => [h("b", {}, said(key.name)), " ", h("span", { class: "soft small mono" }, `…${key.hint}`)],
        },
        {
          name: "May",
          cell: (key) =>
            h(
              "span",
              { class: "scopes" },
              key.scopes.map((scope) => chip(scope)),
            ),
        },
        { name: "Last used", fit: true, cell: (key) => ago(key.last_used_at) },
        {
          name: "Ends",
          fit: true,
          cell: (key) =>
            key.revoked_at
              ? chip("Revoked", "bad")
              : key.expires_at
                ? gone(key)
                  ? chip("Expired", "bad")
                  : date(key.expires_at)
                : "never",
        },
        {
          name: "What to do",
          hidden: true,
          fit: true,
          cell: (key) =>
            gone(key)
              ? null
              : h(
                  "div",
                  { class: "row" },
                  key.id === session.me.key.id
                    ? h("span", { class: "soft small" }, "this one")
                    : session.may("admin") &&
                        button("Revoke", () => revoked(key, again), { kind: "slim danger", label: `Revoke ${key.name}` }),
                ),
        },
      ],
      sorted,
    ),
  );
}

async function revoked(key, again) {
  const done = await confirmed(
    "Revoke this key?",
    ["Programs that use ", said(key.name), " are refused from now on. This cannot be undone."],
    "Revoke the key",
    () => call("DELETE", `x_keys/${key.id}`),
  );
  if (done) {
    announce("Key revoked");
    again();
  }
}

/** Ask what a new key is for, make it, and show it: the only time that it can be seen. */
async function made(again) {
  const key = await dialog("New key", (close) => {
    const name = field("Name", h("input", { maxlength: 64, placeholder: "support-bot", autocomplete: "off", dir: "auto" }), {
      help: "Of the program that will use it.",
    });
    const boxes = SCOPES.map(([scope]) =>
      h("input", { type: "checkbox", value: scope, checked: scope === "read" || scope === "chat" }),
    );
    const ends = field(
      "It ends",
      select(
        [
          { value: "", text: "never" },
          { value: "7", text: "in 7 days" },
          { value: "30", text: "in 30 days" },
          { value: "90", text: "in 90 days" },
          { value: "365", text: "in a year" },
        ],
        "90",
      ),
    );
    const wrong = h("div", {});
    const make = button("Make the key", null, { kind: "first", type: "submit" });
    return h(
      "form",
      {
        novalidate: true,
        on: {
          submit: (event) => {
            event.preventDefault();
            if (!name.control.value.trim()) return void (name.wrong("Give it a name."), name.control.focus());
            const scopes = boxes.filter((box) => box.checked).map((box) => box.value);
            if (!scopes.length) return void fill(wrong, notice("bad", "Choose what the key may do."));
            busy(make, async () => {
              try {
                close(
                  await post("x_keys", {
                    name: name.control.value.trim(),
                    scopes,
                    expires_in_s: ends.control.value ? Number(ends.control.value) * 86_400 : null,
                  }),
                );
              } catch (error) {
                fill(wrong, failure(error));
              }
            });
          },
        },
      },
      name,
      h(
        "fieldset",
        { class: "field" },
        h("legend", {}, "It may"),
        h(
          "div",
          { class: "stack tight" },
          SCOPES.map(([scope, help], n) =>
            h("label", { class: "choice" }, boxes[n], h("b", {}, scope), h("span", { class: "help" }, help)),
          ),
        ),
      ),
      ends,
      wrong,
      h(
        "div",
        { class: "buttons" },
        button("Close", () => close(null)),
        make,
      ),
    );
  });
  if (!key) return;
  again();
  await dialog("Your new key", (close) => [
    notice("warn", "Copy it now", h("p", {}, "The service keeps only a hash of it: it cannot be shown again.")),
    copyable(key.key, "the key"),
    h(
      "div",
      { class: "buttons" },
      button("I have copied it", () => close(null), { kind: "first" }),
    ),
  ]);
}
