// The fifth step: the same question to a base and to a tuned model, side by side, word by word as they come. Every answer names the
// adapter that gave it; it is compared with the one that the model's record names. Next: keys.js.

import { get, session } from "../api.js";
import { fill, h, icon, said } from "../dom.js";
import { count, modelName, significant, tunedOf } from "../format.js";
import { announce, button, chip, failure, field, ghosts, head, lacking, link, loaded, select } from "../parts.js";
import { streamed } from "../stream.js";

const SAMPLES = [
  "What does fine-tuning do to a model?",
  "כתבו משפט אחד על ירושלים בבוקר.",
  "תרגמו לאנגלית: הספר החדש נמצא על השולחן.",
  "Translate to Hebrew: the train leaves at 08:15.",
];

export function playground({ place, query, signal }) {
  const body = h("div", {});
  fill(
    place,
    head("Playground", "One question, two answers: the base as it was, and what your examples made of it.", {
      actions: [link("Next: keys and usage", "#/keys", { kind: "first", symbol: "arrow" })],
    }),
    lacking(session, "chat", "ask models"),
    body,
  );
  loaded(body, {
    signal,
    waiting: ghosts(1, 420),
    load: () => get("models", {}, signal),
    draw: ({ data }) => draw(data, query, signal),
  });
}

function draw(models, query, signal) {
  const tuned = tunedOf(models);
  const bases = models.filter(({ id, x_base }) => !id.startsWith("ft:") && !x_base); // an alias is no other base
  const chosen = tuned.find(({ id }) => id === query.get("tuned")) ?? (query.get("base") ? null : tuned[0]);
  const base = query.get("base") ?? chosen?.x_base ?? bases[0]?.id;
  const records = new Map(models.map((model) => [model.id, model]));
  const panes = [
    pane(
      "Base",
      bases.map(({ id }) => ({ value: id, text: id })),
      base,
      records,
      "base",
    ),
    pane(
      "Tuned",
      tuned.map(({ id }) => ({ value: id, text: tunedText(id) })),
      chosen?.id ?? tuned[0]?.id,
      records,
      "tuned",
    ),
  ];
  const settings = settingsOf();
  const text = h("textarea", {
    rows: 2,
    dir: "auto",
    placeholder: "Ask both",
    on: {
      keydown: (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        ask();
      },
    },
  });
  const question = field("Your question", text, { hideLabel: true });
  const go = button("Ask", null, { kind: "first", symbol: "send", type: "submit", disabled: !session.may("chat") });
  const stop = button("Stop", () => stopping?.abort(), { symbol: "stop" });
  const anew = button(
    "New conversation",
    () => {
      stopping?.abort();
      panes.forEach((one) => one.clear());
      text.focus();
    },
    { kind: "plain" },
  );
  let stopping = null;

  async function ask() {
    const asked = text.value.trim();
    if (stopping || !session.may("chat")) return;
    if (!asked) return void (question.wrong("Write a question first."), text.focus());
    if (!settings.check()) return;
    stopping = new AbortController();
    signal.addEventListener("abort", () => stopping?.abort(), { once: true });
    text.value = "";
    shown(true);
    await Promise.all(panes.map((one) => one.ask(asked, settings, stopping.signal)));
    stopping = null;
    if (signal.aborted) return;
    shown(false);
    announce("The answers are complete");
  }

  function shown(going) {
    go.hidden = going;
    stop.hidden = !going;
    (going ? stop : text).focus();
  }

  stop.hidden = true;
  return h(
    "div",
    { class: "stack" },
    h(
      "div",
      { class: "panes" },
      panes.map((one) => one.element),
    ),
    h(
      "form",
      {
        class: "card ask",
        on: {
          submit: (event) => {
            event.preventDefault();
            ask();
          },
        },
      },
      h(
        "div",
        { class: "row samples", "aria-label": "Samples" },
        SAMPLES.map((sample) =>
          button(
            said(sample),
            () => {
              text.value = sample;
              text.dispatchEvent(new Event("input"));
              text.focus();
            },
            { kind: "slim" },
          ),
        ),
      ),
      h("div", { class: "say" }, question, h("div", { class: "row" }, go, stop)),
      h("div", { class: "line" }, h("span", { class: "soft small" }, "Enter asks, Shift and Enter begins a new line."), anew),
    ),
    settings.element,
  );
}

function tunedText(id) {
  const { called, base, step } = modelName(id);
  return `${called}${step === null ? "" : ` at step ${step}`} · ${base}`;
}

/** Return one side: its model, its conversation, and how it is asked. */
function pane(title, options, value, records, kind) {
  const log = h("div", { class: "talk", tabindex: "0", "aria-label": `Conversation with the ${kind} model` });
  const choice = options.length ? select(options, value, { "aria-label": `${title} model` }) : null;
  const hash = h("span", { class: "soft small mono" });
  let talk = [];

  function told() {
    if (!choice) return;
    const found = records.get(choice.value)?.x_adapter_hash;
    hash.textContent = found ? `adapter ${found.slice(0, 12)}` : "no adapter";
    hash.title = found ?? "";
  }

  function clear() {
    talk = [];
    fill(
      log,
      choice
        ? h("p", { class: "soft hint" }, kind === "base" ? "The base answers here." : "Your model answers here.")
        : h(
            "div",
            { class: "hint" },
            h("p", { class: "soft" }, "There is no tuned model yet. When a job succeeds, it answers here at once."),
            link("Plan a job", "#/tune", { kind: "slim", symbol: "arrow" }),
          ),
    );
  }

  async function ask(asked, settings, signal) {
    if (!choice) return;
    if (!talk.length) fill(log);
    talk.push({ role: "user", content: asked });
    const answer = bubble("assistant", "");
    log.append(bubble("user", asked), answer);
    answer.classList.add("coming");
    const started = performance.now();
    const facts = { text: "", first: null, usage: null, hash: undefined, reason: null };
    try {
      for await (const chunk of streamed(
        "chat/completions",
        {
          model: choice.value,
          messages: settings.messages(talk),
          stream: true,
          stream_options: { include_usage: true },
          ...settings.read(),
        },
        signal,
      )) {
        take(chunk, facts, started);
        if (chunk.choices?.[0]?.delta?.content) {
          answer.firstChild.textContent = facts.text;
          log.scrollTop = log.scrollHeight;
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") log.append(failure(error));
      facts.reason ??= "stopped";
    }
    answer.classList.remove("coming");
    if (facts.text) talk.push({ role: "assistant", content: facts.text });
    else talk.pop(); // What was not answered is not part of the next question.
    if (!facts.text)
      answer.firstChild.replaceChildren(
        h("span", { class: "soft" }, facts.reason === "stopped" ? "Nothing came." : "An empty answer."),
      );
    answer.append(footer(facts, performance.now() - started, records.get(choice.value)));
    log.scrollTop = log.scrollHeight;
  }

  if (choice)
    choice.addEventListener("change", () => {
      told();
      clear();
    });
  told();
  clear();
  return {
    element: h(
      "section",
      { class: `card pane ${kind}`, "aria-label": title },
      h("div", { class: "line" }, h("h2", {}, title), hash),
      choice,
      log,
    ),
    ask,
    clear,
  };
}

function take(chunk, facts, started) {
  const choice = chunk.choices?.[0];
  if (chunk.x_adapter_hash !== undefined) facts.hash = chunk.x_adapter_hash;
  if (choice?.delta?.content) {
    facts.first ??= performance.now() - started;
    facts.text += choice.delta.content;
  }
  facts.reason = choice?.finish_reason ?? facts.reason;
  facts.usage = chunk.usage ?? facts.usage;
}

function bubble(role, text) {
  return h("div", { class: `bubble ${role}` }, h("div", { class: "said", dir: "auto" }, text));
}

/** Return what stands under an answer: how long, how many tokens, and by which adapter. */
function footer(facts, took, record) {
  const expected = record?.x_adapter_hash ?? null;
  const seconds = (ms) => `${significant(ms / 1000, 2)} s`;
  return h(
    "div",
    { class: "row soft small number" },
    facts.usage && h("span", {}, `${count(facts.usage.completion_tokens)} tokens`),
    facts.first !== null && h("span", {}, `first after ${seconds(facts.first)}`),
    h("span", {}, `${seconds(took)} in all`),
    facts.reason === "length" && chip("cut at the limit", "warn"),
    facts.reason === "stopped" && chip("stopped", "warn"),
    facts.hash !== undefined &&
      (facts.hash === expected
        ? facts.hash &&
          h("span", { class: "hash", title: facts.hash }, icon("check"), h("span", { class: "mono" }, facts.hash.slice(0, 12)))
        : chip("answered by another adapter", "bad")),
  );
}

function settingsOf() {
  const system = field("System message", h("textarea", { rows: 2, dir: "auto", placeholder: "None" }));
  const numbers = [
    ["temperature", "Temperature", "0", "0: always the likeliest word. Up to 2."],
    ["top_p", "Top p", "", "Draw from the likeliest words of this share."],
    ["max_tokens", "Most tokens", "200", "Of one answer."],
    ["seed", "Seed", "", "The same one gives the same answer."],
  ].map(([name, label, value, help]) => ({
    name,
    field: field(label, h("input", { inputmode: "decimal", value, autocomplete: "off", placeholder: "default", name }), { help }),
  }));
  return {
    element: h(
      "details",
      { class: "card" },
      h("summary", {}, "Settings of both"),
      h(
        "div",
        { class: "stack" },
        system,
        h(
          "div",
          { class: "fields" },
          numbers.map((one) => one.field),
        ),
      ),
    ),
    messages: (talk) => (system.control.value.trim() ? [{ role: "system", content: system.control.value.trim() }, ...talk] : talk),
    check() {
      const wrong = numbers.find(({ field: { control } }) => control.value.trim() && !Number.isFinite(Number(control.value)));
      if (!wrong) return true;
      wrong.field.wrong("Write a number, or nothing for the default.");
      wrong.field.closest("details").open = true;
      wrong.field.control.focus();
      return false;
    },
    read: () =>
      Object.fromEntries(
        numbers
          .filter(({ field: { control } }) => control.value.trim())
          .map(({ name, field: { control } }) => [name, Number(control.value)]),
      ),
  };
}
