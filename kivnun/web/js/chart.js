// Curves and bars, drawn as SVG at the size they are shown in, so that their letters stay readable on a phone. The curve can be
// read by pointer and by arrow keys; the same numbers stand in a table beside it. Next: views/job.js, views/keys.js.

import { fill, h, put, s } from "./dom.js";
import { loss, short } from "./format.js";

const MARGIN = { left: 46, right: 14, top: 12, bottom: 34 };
const MOST_POINTS = 600;

/** Return steps of 1, 2 or 5 times a power of ten that cover low..high, about `wanted` of them. */
export function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const far = (step) => Math.abs(Math.log(step / rough));
  const size = [1, 2, 5, 10].map((step) => step * power).reduce((best, step) => (far(step) < far(best) ? step : best));
  const found = [];
  for (let at = Math.ceil(low / size - 1e-9); at * size <= high + size * 1e-9; at += 1)
    found.push(Number((at * size).toPrecision(12)));
  return found;
}

/** Return at most MOST_POINTS points: means of neighbours where there are more. */
export function thinned(points) {
  if (points.length <= MOST_POINTS) return points;
  const each = Math.ceil(points.length / MOST_POINTS);
  const mean = (group, axis) => group.reduce((sum, point) => sum + point[axis], 0) / group.length;
  return Array.from({ length: Math.ceil(points.length / each) }, (_, n) => points.slice(n * each, (n + 1) * each)).map((group) => ({
    x: mean(group, "x"),
    y: mean(group, "y"),
  }));
}

/** Return the running mean over about a twentieth of the points: what the eye looks for among noisy steps. */
export function smoothed(points) {
  const reach = Math.max(1, Math.round(points.length / 40));
  return points.map((point, n) => {
    const near = points.slice(Math.max(0, n - reach), n + reach + 1);
    return { x: point.x, y: near.reduce((sum, other) => sum + other.y, 0) / near.length };
  });
}

/** Return a chart of lines by step. `set(series, end)` draws it: series are {name, points: [{x, y}], noisy}, `end` the last step. */
export function curve(label) {
  const drawing = s("svg", { role: "img", tabindex: "0", "aria-label": label });
  const legend = h("div", { class: "legend" });
  const whole = h("div", { class: "curve" }, drawing, legend);
  let series = [];
  let end = 1;
  let chosen = null;
  let stepAt = () => 0; // Which step is drawn so far from the left, in pixels.

  function bounds() {
    const values = series.flatMap(({ points }) => points.map(({ y }) => y)).filter(Number.isFinite);
    const low = Math.min(0, ...values);
    const high = values.length ? Math.max(...values) : 1;
    return { low, high: high > low ? high + (high - low) * 0.05 : low + 1 };
  }

  function draw() {
    const width = Math.max(240, drawing.clientWidth);
    const height = drawing.clientHeight || 260;
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    if (!series.some(({ points }) => points.length)) {
      fill(drawing, s("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "No step yet"));
      return;
    }
    const { low, high } = bounds();
    const first = Math.min(1, ...series.flatMap(({ points }) => points.map(({ x }) => x)));
    const x = (step) => MARGIN.left + ((step - first) / Math.max(1, end - first)) * (width - MARGIN.left - MARGIN.right);
    const y = (value) => height - MARGIN.bottom - ((value - low) / (high - low)) * (height - MARGIN.top - MARGIN.bottom);
    fill(
      drawing,
      ticks(low, high, 5).map((value) => [
        s("line", { class: "grid-line", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
        s("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, String(value)),
      ]),
      s("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(low), y2: y(low) }),
      ticks(first, Math.max(end, first + 1), Math.max(2, width / 110))
        .filter(Number.isInteger)
        .map((step) => s("text", { x: x(step), y: height - MARGIN.bottom + 18, "text-anchor": "middle" }, short(step))),
      s("text", { x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 1, "text-anchor": "middle" }, "step"),
      series.map((one, n) => line(one, n, x, y)),
      chosen !== null && s("line", { class: "cross", x1: x(chosen), x2: x(chosen), y1: MARGIN.top, y2: height - MARGIN.bottom }),
    );
    stepAt = (left) => first + ((left - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * (end - first);
  }

  function line({ points, noisy }, n, x, y) {
    const path = (list) => list.map((point, at) => `${at ? "L" : "M"}${x(point.x).toFixed(1)} ${y(point.y).toFixed(1)}`).join("");
    const drawn = thinned(points.filter((point) => Number.isFinite(point.y)));
    const many = noisy && drawn.length > 12;
    return [
      many && s("path", { class: `plot faint c${n}`, d: path(drawn) }),
      s("path", { class: `plot c${n}`, d: path(many ? smoothed(drawn) : drawn) }),
      !many && drawn.length <= 40 && drawn.map((point) => s("circle", { class: `c${n}`, cx: x(point.x), cy: y(point.y), r: 3.5 })),
    ];
  }

  function told() {
    fill(
      legend,
      chosen === null ? null : h("span", {}, "step ", h("b", {}, chosen)),
      series.map(({ name, points }, n) => {
        const at = chosen === null ? points.at(-1) : points.find((point) => point.x === chosen);
        return h("span", {}, h("span", { class: `swatch c${n}` }), name, at ? h("b", {}, ` ${loss(at.y)}`) : null);
      }),
    );
  }

  function choose(step) {
    const known = [...new Set(series.flatMap(({ points }) => points.map((point) => point.x)))].sort((a, b) => a - b);
    chosen =
      step === null || !known.length ? null : known.reduce((best, at) => (Math.abs(at - step) < Math.abs(best - step) ? at : best));
    draw();
    told();
    return known;
  }

  drawing.addEventListener("pointermove", (event) => choose(stepAt(event.clientX - drawing.getBoundingClientRect().left)));
  drawing.addEventListener("pointerleave", () => choose(null));
  drawing.addEventListener("blur", () => choose(null));
  drawing.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    const known = choose(chosen ?? end);
    const to = Math.max(0, Math.min(known.length - 1, known.indexOf(chosen) + by));
    if (known.length) choose(known[to]);
    drawing.setAttribute("aria-label", `${label}. ${legend.textContent}`);
  });
  new ResizeObserver(draw).observe(drawing);

  whole.set = (given, last) => {
    series = given;
    end = Math.max(2, last ?? 0, ...series.flatMap(({ points }) => points.map(({ x }) => x)));
    draw();
    told();
  };
  return whole;
}

/** Return stacked bars. `days`: [{name, values: [..]}], `names` of the values; `tell(day)` is the words for one day. */
export function bars(days, names, tell) {
  const drawing = s("svg", { role: "img", "aria-label": `Tokens by day: ${names.join(", ")}` });
  const high = Math.max(1, ...days.map(({ values }) => values.reduce((sum, value) => sum + value, 0)));
  function draw() {
    const width = Math.max(240, drawing.clientWidth);
    const height = drawing.clientHeight || 220;
    const slot = (width - MARGIN.left - MARGIN.right) / days.length;
    const y = (value) => height - MARGIN.bottom - (value / high) * (height - MARGIN.top - MARGIN.bottom);
    const every = Math.ceil(days.length / Math.max(1, Math.floor(width / 90)));
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    fill(
      drawing,
      ticks(0, high, 4).map((value) => [
        s("line", { class: "grid-line", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
        s("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)),
      ]),
      s("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(0), y2: y(0) }),
      days.map((day, n) => {
        const left = MARGIN.left + n * slot;
        const group = s(
          "g",
          {},
          s("title", {}, tell(day)),
          s("rect", { x: left, y: MARGIN.top, width: slot, height: height - MARGIN.top - MARGIN.bottom, fill: "transparent" }),
        );
        let below = 0;
        day.values.forEach((value, kind) => {
          if (value > 0)
            put(
              group,
              s("rect", {
                class: `c${kind}`,
                x: left + slot * 0.15,
                width: slot * 0.7,
                y: y(below + value),
                height: Math.max(1, y(below) - y(below + value)),
                rx: Math.min(2, slot * 0.1),
              }),
            );
          below += value;
        });
        if ((days.length - 1 - n) % every === 0)
          put(
            group,
            s(
              "text",
              {
                x: left + slot / 2,
                y: height - MARGIN.bottom + 18,
                "text-anchor": n === days.length - 1 && days.length > 10 ? "end" : "middle",
              },
              day.name,
            ),
          );
        return group;
      }),
    );
  }
  new ResizeObserver(draw).observe(drawing);
  return h(
    "div",
    { class: "curve bars" },
    drawing,
    h(
      "div",
      { class: "legend" },
      names.map((name, n) => h("span", {}, h("span", { class: `swatch block c${n}` }), name)),
    ),
  );
}
