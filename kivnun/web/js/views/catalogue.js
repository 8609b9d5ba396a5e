// The first step: what there is to tune. Bases with their prices, what is refused and why, and the models tuned so far.
// Next: data.js.

import { all, call, get, session } from "../api.js";
import { fill, h, said } from "../dom.js";
import { ago, modelName, money, sentence, short, tunedOf } from "../format.js";
import { announce, button, chip, confirmed, empty, ghosts, head, inTurn, link, loaded, table } from "../parts.js";

export function catalogue({ place, signal }) {
  const bases = h("div", { class: "grid" });
  const tuned = h("div", {});
  fill(
    place,
    head("Catalogue", "The bases that this service tunes and serves. Choose one, or go on from a model of your own.", {
      actions: [link("Next: your data", "#/data", { kind: "first", symbol: "arrow" })],
    }),
    h("section", { class: "section" }, h("h2", {}, "Bases"), bases),
  );
  const show = () =>
    loaded(tuned, {
      signal,
      waiting: ghosts(1, 96),
      load: () => all("models", {}, signal),
      draw: (models) => drawTuned(models, show),
    });
  inTurn(
    place,
    signal,
    [null, () => loaded(bases, { signal, waiting: ghosts(3, 236), load: () => get("x_catalogue", {}, signal), draw: drawBases })],
    [h("section", { class: "section" }, h("h2", {}, "Your tuned models"), tuned), show],
  );
}

function drawBases(found) {
  if (!found.data.length && !found.refused.length)
    return empty("catalogue", "No base is configured", "The operator adds bases to the service's configuration.");
  return [...found.data.map((base) => card(base, found.currency)), ...found.refused.map(refusedCard)];
}

function card(base, currency) {
  const free = !base.price.training && !base.price.prompt && !base.price.completion;
  return h(
    "article",
    { class: "card base" },
    h(
      "div",
      { class: "line" },
      h("span", { class: "family" }, base.family ? `Family ${base.family}` : "Not on this machine yet"),
      base.resident && chip("Loaded", "good"),
    ),
    h("h3", {}, said(base.id)),
    h(
      "dl",
      { class: "prices" },
      fact("Window", base.window ? `${short(base.window)} tokens` : "–"),
      fact("Training", free ? "free" : price(base.price.training, currency)),
      fact("Prompt", free ? "free" : price(base.price.prompt, currency)),
      fact("Answer", free ? "free" : price(base.price.completion, currency)),
    ),
    h(
      "div",
      { class: "row techniques", "aria-label": "Techniques" },
      [...base.methods.map((name) => METHODS[name] ?? name), ...base.techniques].map((name) => chip(name)),
    ),
    h(
      "div",
      { class: "row foot" },
      link("Tune it", `#/tune?model=${encodeURIComponent(base.id)}`, { kind: "slim" }),
      link("Try it", `#/playground?base=${encodeURIComponent(base.id)}`, { kind: "slim plain" }),
    ),
  );
}

const METHODS = { supervised: "Supervised", dpo: "DPO" };
const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
const price = (amount, currency) => [money(amount, currency), h("span", { class: "soft" }, " / M")];

function refusedCard(base) {
  return h(
    "article",
    { class: "card base refused" },
    h("div", { class: "line" }, h("span", { class: "family" }, "Base"), chip("Not offered", "warn")),
    h("h3", {}, said(base.id)),
    h("p", { class: "soft" }, sentence(base.reason)),
  );
}

function drawTuned(models, again) {
  const own = tunedOf(models);
  if (!own.length) {
    return empty(
      "tune",
      "No tuned model yet",
      "When a job succeeds, its model is listed here and answers at once.",
      link("Plan a job", "#/tune", { symbol: "arrow" }),
    );
  }
  return h(
    "div",
    { class: "card" },
    table(
      "Your tuned models",
      [
        { name: "Model", lead: true, cell: ({ id }) => named(id) },
        { name: "Base", cell: ({ id }) => said(modelName(id).base) },
        { name: "Made", fit: true, cell: ({ created }) => ago(created) },
        {
          name: "What to do",
          hidden: true,
          fit: true,
          cell: ({ id }) =>
            h(
              "div",
              { class: "row" },
              link("Try", `#/playground?tuned=${encodeURIComponent(id)}`, { kind: "slim" }),
              link("Tune on", `#/tune?model=${encodeURIComponent(id)}`, { kind: "slim plain" }),
              session.may("tune") &&
                button(null, () => removed(id, again), {
                  kind: "slim plain",
                  symbol: "bin",
                  label: `Delete ${id}`,
                  title: "Delete",
                }),
            ),
        },
      ],
      own,
    ),
  );
}

function named(id) {
  const { called, step } = modelName(id);
  return [
    h("b", {}, said(called)),
    step !== null && [" ", chip(`checkpoint at step ${step}`)],
    h("div", { class: "soft small mono" }, said(id)),
  ];
}

async function removed(id, again) {
  const done = await confirmed(
    "Delete this model?",
    [said(id), " will answer nobody any more, and its weights are erased. This cannot be undone."],
    "Delete the model",
    () => call("DELETE", `models/${encodeURIComponent(id)}`),
  );
  if (done) {
    announce("Model deleted");
    again();
  }
}
