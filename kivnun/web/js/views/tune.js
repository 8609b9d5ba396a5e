// The third step: parameters, and what a job with them would be: whether it fits, what it takes and what it costs. Nothing is spent
// before that was shown for exactly the parameters in the form. Next: verdict.js, jobs.js.

import { all, get, newName, post, session } from "../api.js";
import { fill, h } from "../dom.js";
import { count, modelName, sentence, tunedOf } from "../format.js";
import { announce, busy, button, failure, field, ghosts, head, lacking, link, loaded, notice, select } from "../parts.js";
import { drawVerdict } from "./verdict.js";

const METHODS = [
  { value: "supervised", name: "Supervised", help: "Learns to answer as the examples do." },
  { value: "dpo", name: "Preferences (DPO)", help: "Learns which of two answers is the better one." },
];
const NUMBERS = [
  { name: "n_epochs", label: "Epochs", help: "How often each example is seen, 1 to 50." },
  { name: "batch_size", label: "Batch size", help: "Examples of one step, 1 to 256." },
  { name: "learning_rate_multiplier", label: "Learning-rate multiplier", help: "Of the base's own rate." },
  { name: "beta", label: "Beta", help: "How close to the base it stays, up to 2.", method: "dpo" },
];

export function tune({ place, query, signal }) {
  const body = h("div", {});
  fill(
    place,
    head("Parameters", "Say what to train on what. You see the plan, with its time and its price, before anything is spent."),
    lacking(session, "tune", "start jobs"),
    body,
  );
  loaded(body, {
    signal,
    waiting: ghosts(1, 520),
    load: async () => {
      const [catalogue, models, files] = await Promise.all([
        get("x_catalogue", {}, signal),
        all("models", {}, signal),
        all("files", { purpose: "fine-tune", limit: 500 }, signal),
      ]);
      return {
        catalogue,
        models,
        files: files.filter((file) => file.status === "processed"),
        waiting: files.filter((file) => file.status === "uploaded").length,
      };
    },
    draw: (found) => drawForm(found, query, signal),
  });
}

function drawForm({ catalogue, models, files, waiting }, query, signal) {
  const parts = fieldsOf(catalogue, models, files, query);
  const verdict = h("div", { class: "stack", "aria-live": "polite" });
  const wrong = h("div", {});
  const check = button("Check the plan", null, { kind: "first", type: "submit", disabled: !session.may("tune") });
  const start = button("Start the job", () => begin(), { kind: "first", symbol: "arrow" });
  let agreed = null; // The parameters that the verdict on the page is about, as text, and the name their start is sent under.

  const form = h(
    "form",
    {
      class: "tune",
      novalidate: true,
      on: {
        submit: (event) => {
          event.preventDefault();
          plan();
        },
        input: changed,
        change: changed,
      },
    },
    h(
      "div",
      { class: "stack" },
      files.length === 0 &&
        notice(
          "warn",
          waiting ? "Your files are still being checked" : "There is no file to train on yet",
          h("p", {}, waiting ? "Come back in a moment." : "Send a file with examples first. It is checked line by line."),
          h("div", { class: "row" }, link("To your data", "#/data", { kind: "slim" })),
        ),
      section("What is tuned", parts.model, parts.method),
      section("On what", h("div", { class: "fields" }, parts.training, parts.validation)),
      section(
        "How",
        h("div", { class: "fields" }, parts.numbers),
        h(
          "details",
          {},
          h("summary", {}, "More: rank, seed, long examples"),
          h("div", { class: "fields" }, parts.rank, parts.seed, parts.long),
        ),
      ),
      section("Its name", parts.suffix),
    ),
    h(
      "aside",
      { class: "plan", "aria-label": "The plan" },
      h("div", { class: "card stack" }, h("h2", {}, "The plan"), wrong, verdict, check, start),
    ),
  );

  function idle(stale) {
    agreed = null;
    start.hidden = true;
    check.classList.add("first");
    fill(
      verdict,
      stale
        ? notice("warn", "The parameters changed", h("p", {}, "Check the plan again: what was shown was for others."))
        : h(
            "p",
            { class: "soft" },
            "Nothing is spent by checking. You see whether the job fits, its tokens, cost, time and place in the queue.",
          ),
    );
  }

  function changed() {
    parts.follow();
    fill(wrong);
    if (agreed && agreed.text !== JSON.stringify(parts.read())) idle(true);
  }

  async function plan() {
    if (!parts.check()) return;
    fill(wrong);
    const asked = parts.read();
    await busy(check, async () => {
      try {
        const found = await post("fine_tuning/jobs", { ...asked, x_dry_run: true }, { signal });
        agreed = { text: JSON.stringify(asked), name: newName() };
        fill(verdict, drawVerdict(found));
        start.hidden = !found.fits;
        check.classList.toggle("first", !found.fits);
        announce(found.fits ? "The plan fits. You can start the job." : "The plan does not fit.");
        if (found.fits) start.focus({ preventScroll: true });
      } catch (error) {
        told(error);
      }
    });
  }

  async function begin() {
    const sent = agreed;
    if (!sent) return;
    await busy(start, async () => {
      try {
        const job = await post("fine_tuning/jobs", JSON.parse(sent.text), { signal, headers: { "Idempotency-Key": sent.name } });
        announce("The job is started");
        location.hash = `#/jobs/${job.id}`;
      } catch (error) {
        told(error);
      }
    });
  }

  function told(error) {
    if (signal.aborted) return;
    idle(false);
    const at = parts.named(error.param);
    if (at) {
      at.closest("details")?.setAttribute("open", "");
      at.wrong(sentence(error.message));
      at.control.focus();
    } else fill(wrong, failure(error));
  }

  parts.follow();
  idle(false);
  return form;
}

const section = (title, ...content) => h("section", { class: "card stack" }, h("h2", {}, title), content);

function fieldsOf(catalogue, models, files, query) {
  const offered = catalogue.data.filter((base) => base.tunable);
  const own = tunedOf(models);
  const name = (file) => ({ value: file.id, text: `${file.filename} · ${file.id.slice(-6)}` });
  const model = field(
    "Base or tuned model",
    select(
      [
        { group: "Bases", options: offered.map((base) => ({ value: base.id, text: base.id })) },
        ...(own.length
          ? [{ group: "Your tuned models: go on from one", options: own.map(({ id }) => ({ value: id, text: tunedText(id) })) }]
          : []),
      ],
      query.get("model") ?? offered[0]?.id,
    ),
    { help: "A tuned model or a checkpoint is continued: its adapter is where the new job begins." },
  );
  const training = field(
    "Training file",
    select(
      [{ value: "", text: files.length ? "Choose a file" : "No file is ready" }, ...files.map(name)],
      query.get("training_file") ?? "",
    ),
  );
  const validation = field(
    "Validation file",
    select([{ value: "", text: "None" }, ...files.map(name)], query.get("validation_file") ?? ""),
    { help: "Scored while it trains, never learnt from." },
  );
  const radios = METHODS.map((method) =>
    h("input", {
      type: "radio",
      name: "method",
      value: method.value,
      checked: method.value === (query.get("method") ?? "supervised"),
    }),
  );
  const method = h(
    "fieldset",
    { class: "field" },
    h("legend", {}, "Method"),
    h(
      "div",
      { class: "choices" },
      METHODS.map(({ name: title, help }, n) =>
        h("label", { class: "choice" }, radios[n], h("b", {}, title), h("span", { class: "help" }, help)),
      ),
    ),
  );
  const numbers = NUMBERS.map((number) =>
    field(number.label, h("input", { inputmode: "decimal", placeholder: "auto", autocomplete: "off", name: number.name }), {
      help: number.help,
    }),
  );
  const rank = field(
    "LoRA rank",
    h("input", { inputmode: "numeric", placeholder: "the base's own", autocomplete: "off", name: "rank" }),
    { help: "Capacity of the adapter: 8 to 64 for most." },
  );
  const seed = field("Seed", h("input", { inputmode: "numeric", placeholder: "drawn", autocomplete: "off", name: "seed" }), {
    help: "The same seed and data give the same bits.",
  });
  const long = field(
    "Examples that are too long",
    select(
      [
        { value: "", text: "Refuse the job" },
        { value: "truncate", text: "Cut them" },
      ],
      "",
    ),
    { help: "Each one is told in the job's report." },
  );
  const suffix = field(
    "Suffix",
    h("input", { maxlength: 64, placeholder: "support-he", autocomplete: "off", name: "suffix", dir: "auto" }),
    { help: "Becomes part of the model's name, so that you find it again." },
  );
  const kind = () => radios.find((radio) => radio.checked).value;
  const shown = () =>
    NUMBERS.map((number, n) => ({ ...number, field: numbers[n] })).filter((number) => !number.method || number.method === kind());

  return {
    model,
    method,
    training,
    validation,
    numbers,
    rank,
    seed,
    long,
    suffix,
    /** Show the fields of the method that is chosen. */
    follow() {
      NUMBERS.forEach((number, n) => {
        numbers[n].hidden = Boolean(number.method) && number.method !== kind();
      });
    },
    /** Return whether what the service cannot tell better is right; else say it and go there. */
    check() {
      const first = [
        !training.control.value && [training, "Choose a file to train on."],
        training.control.value &&
          training.control.value === validation.control.value && [
            validation,
            "This is the training file: choose another, or none.",
          ],
        ...[...shown().map((number) => number.field), rank, seed].map((one) => {
          const text = one.control.value.trim();
          return (
            text &&
            text !== "auto" &&
            !Number.isFinite(Number(text)) && [one, `${text} is no number. Leave it empty for the default.`]
          );
        }),
      ].filter(Boolean);
      first.forEach(([one, text]) => one.wrong(text));
      if (first.length) {
        first[0][0].closest("details")?.setAttribute("open", "");
        first[0][0].control.focus();
      }
      return first.length === 0;
    },
    /** Return the body of the request; what is left empty is left to the service. */
    read() {
      const number = (one) => {
        const text = one.control.value.trim();
        return text === "" || text === "auto" ? undefined : Number(text);
      };
      const hyperparameters = Object.fromEntries(shown().map((one) => [one.name, number(one.field) ?? "auto"]));
      return {
        model: model.control.value,
        training_file: training.control.value,
        validation_file: validation.control.value || undefined,
        method: { type: kind(), [kind()]: { hyperparameters } },
        suffix: suffix.control.value.trim() || undefined,
        seed: number(seed),
        x_lora: number(rank) === undefined ? undefined : { rank: number(rank) },
        x_over_long: long.control.value || undefined,
      };
    },
    /** Return the field that a param of the API's errors is about. */
    named(param) {
      const last = (param ?? "").split(".").at(-1);
      return {
        model,
        training_file: training,
        validation_file: validation,
        suffix,
        seed,
        rank,
        x_lora: rank,
        x_over_long: long,
        ...Object.fromEntries(shown().map((one) => [one.name, one.field])),
      }[last];
    },
  };
}

function tunedText(id) {
  const { called, base, step } = modelName(id);
  return `${called}${step === null ? "" : ` at step ${step}`} · ${base}`;
}
