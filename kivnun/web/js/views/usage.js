// Tokens and money by day and by model, and the tenant's limits. Next: ../chart.js.

import { get } from "../api.js";
import { bars } from "../chart.js";
import { fill, h, said } from "../dom.js";
import { bytes, count, date, money, short } from "../format.js";
import { empty, field, ghosts, loaded, select, table, tiles } from "../parts.js";

const DAY_S = 86_400;
const KINDS = ["training", "prompt", "completion"];
const RANGES = [
  { value: "7", text: "7 days" },
  { value: "30", text: "30 days" },
  { value: "90", text: "90 days" },
];

export function drawUsage(place, signal) {
  const body = h("div", {});
  const range = field("Days", select(RANGES, "30"), { hideLabel: true });
  const show = () =>
    loaded(body, { signal, waiting: ghosts(1, 420), load: () => asked(Number(range.control.value), signal), draw });
  range.control.addEventListener("change", show);
  fill(
    place,
    h("section", { class: "section" }, h("div", { class: "line" }, h("h2", {}, "Usage"), h("div", { class: "days" }, range)), body),
  );
  return show();
}

async function asked(days, signal) {
  const end = Math.ceil(Date.now() / 1000 / DAY_S) * DAY_S;
  const query = { start: end - days * DAY_S, end };
  const [byDay, byModel] = await Promise.all([
    get("x_usage", { ...query, group_by: "day" }, signal),
    get("x_usage", { ...query, group_by: "model" }, signal),
  ]);
  return { byDay, byModel, ...query };
}

function draw({ byDay, byModel, start, end }) {
  const { currency } = byDay;
  const sum = (rows, name, kind) =>
    rows.filter((row) => !kind || row.kind === kind).reduce((total, row) => total + Number(row[name]), 0);
  if (!byDay.data.length)
    return empty("keys", "Nothing used yet", "Tokens that are trained, asked and answered are counted here, with their price.");
  const days = [];
  for (let day = start; day < end; day += DAY_S) {
    const rows = byDay.data.filter((row) => row.group === new Date(day * 1000).toISOString().slice(0, 10));
    days.push({ name: date(day), cost: sum(rows, "cost"), values: KINDS.map((kind) => sum(rows, "tokens", kind)) });
  }
  const models = [...new Set(byModel.data.map((row) => row.group))]
    .map((model) => ({ model, rows: byModel.data.filter((row) => row.group === model) }))
    .sort((a, b) => sum(b.rows, "cost") - sum(a.rows, "cost") || sum(b.rows, "tokens") - sum(a.rows, "tokens"));
  return h(
    "div",
    { class: "stack" },
    tiles([
      ["Cost", money(Number(byDay.total.cost), currency)],
      ...KINDS.map((kind) => [NAMES[kind], short(sum(byDay.data, "tokens", kind))]),
    ]),
    h(
      "div",
      { class: "card" },
      h("h3", {}, "Tokens by day"),
      bars(
        days,
        KINDS.map((kind) => NAMES[kind]),
        (day) =>
          `${day.name}: ${KINDS.map((kind, n) => `${NAMES[kind]} ${count(day.values[n])}`).join(", ")}; ${money(day.cost, currency)}`,
      ),
    ),
    h(
      "div",
      { class: "card" },
      table(
        "Usage by model",
        [
          { name: "Model", lead: true, cell: (one) => said(one.model) },
          ...KINDS.map((kind) => ({
            name: NAMES[kind],
            end: true,
            fit: true,
            cell: (one) => count(sum(one.rows, "tokens", kind)),
          })),
          { name: "Cost", end: true, fit: true, cell: (one) => money(sum(one.rows, "cost"), currency) },
        ],
        models,
      ),
    ),
  );
}

const NAMES = { training: "Trained", prompt: "Asked", completion: "Answered" };

const LIMITS = [
  ["requests_per_minute", "Requests a minute", count],
  ["tokens_per_minute", "Tokens a minute", count],
  ["active_jobs", "Jobs at once", count],
  ["waiting_jobs", "Jobs in the queue", count],
  ["training_tokens", "Tokens of a job", count],
  ["files", "Files", count],
  ["file_bytes", "Size of a file", bytes],
  ["upload_bytes", "Size of an upload in parts", bytes],
  ["storage_bytes", "Storage", bytes],
  ["answers_at_once", "Answers at once", count],
];

/** Return the limits of the tenant that is signed in, and what was left of them a moment ago. */
export function drawLimits(me) {
  return tiles(
    LIMITS.filter(([name]) => me.limits[name] !== null).map(([name, title, words]) => [
      title,
      [words(me.limits[name]), name in me.left && h("span", { class: "soft left" }, ` ${words(me.left[name])} left`)],
    ]),
  );
}
