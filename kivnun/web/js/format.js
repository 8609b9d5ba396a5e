// Numbers, bytes, times and money as people read them. Everything is pure. Next: parts.js.

const whole = new Intl.NumberFormat("en");

export const count = (value) => (value === null || value === undefined ? "–" : whole.format(value));

/** 1234567 -> "1.23 M". */
export function short(value) {
  if (value === null || value === undefined) return "–";
  for (const [size, unit] of [
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (Math.abs(value) >= size * (unit === "k" ? 10 : 1)) return `${significant(value / size)} ${unit}`;
  }
  return whole.format(value);
}

export function significant(value, digits = 3) {
  return value === 0 ? "0" : String(Number(value.toPrecision(digits)));
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) {
    value /= 1024;
    at += 1;
  }
  return `${at === 0 ? value : value.toFixed(value < 10 ? 1 : 0)} ${units[at]}`;
}

export function loss(value) {
  return value === null || value === undefined ? "–" : value.toFixed(value >= 100 ? 1 : value >= 10 ? 2 : 3);
}

/** Seconds -> "2 min 5 s". */
export function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return "under 1 s";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (seconds < 600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60) % 60} s`;
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
const long = new Intl.DateTimeFormat("en-GB", {
  day: "numeric",
  month: "short",
  year: "numeric",
  hour: "2-digit",
  minute: "2-digit",
});

/** Seconds since 1970 -> the time of day, with the day before it where it is not today. */
export function moment(seconds) {
  if (!seconds) return "–";
  const at = new Date(seconds * 1000);
  return at.toDateString() === new Date().toDateString() ? clock.format(at) : long.format(at);
}

export const date = (seconds) => (seconds ? day.format(new Date(seconds * 1000)) : "–");

/** Seconds since 1970 -> "3 min ago". */
export function ago(seconds) {
  if (!seconds) return "never";
  const passed = Date.now() / 1000 - seconds;
  if (passed < 45) return "just now";
  if (passed < 3600) return `${Math.max(1, Math.round(passed / 60))} min ago`;
  if (passed < 86_400) return `${Math.round(passed / 3600)} h ago`;
  return passed < 86_400 * 30 ? `${Math.round(passed / 86_400)} days ago` : date(seconds);
}

/** An amount of the configured currency; small ones keep the digits that tell them from nothing. */
export function money(amount, currency) {
  if (amount === null || amount === undefined) return "–";
  const digits =
    amount !== 0 && Math.abs(amount) < 0.1
      ? { maximumSignificantDigits: 2 }
      : { minimumFractionDigits: 2, maximumFractionDigits: 2 };
  return new Intl.NumberFormat("en", { style: "currency", currency: currency ?? "EUR", ...digits }).format(amount);
}

export function plural(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

/** Return what the name of a tuned model is made of: its base, what it was called, and the step of a checkpoint. */
export function modelName(id) {
  const parts = id.split(":");
  if (parts[0] !== "ft" || parts.length < 5) return { id, base: id, called: null, step: null };
  const step = parts[5]?.startsWith("ckpt-step-") ? Number(parts[5].slice(10)) : null;
  return { id, base: parts[1], called: parts[3] || parts[4], step };
}

/** Return the tuned models of a list, the newest first; of a job's, the model itself before its checkpoints. */
export function tunedOf(models) {
  const isCheckpoint = (model) => Number(modelName(model.id).step !== null);
  return models
    .filter((model) => model.id.startsWith("ft:"))
    .sort((a, b) => b.created - a.created || isCheckpoint(a) - isCheckpoint(b));
}

/** Return what the API said as a sentence: it begins with a capital, but for a name (`messages[2]`), and ends with a stop. */
export function sentence(text) {
  const said = String(text ?? "").trim();
  return said && (/^[a-z]+[ ,]/.test(said) ? said[0].toUpperCase() : said[0]) + said.slice(1) + (/[.!?…]$/.test(said) ? "" : ".");
}
