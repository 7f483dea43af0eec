// The two figures of a run: the prompt's loss after each step, and the rates by layer, step and kind of projection.

import { count, el, nllText, rateText, svg } from "./dom.js";

const KINDS = { q: ["Q", "query"], k: ["K", "key"], v: ["V", "value"], o: ["O", "output"] };
const KIND_ORDER = "qkvo";

// nll[k] is the loss after k steps; base is the unadapted model's, drawn where a generated start differs from it.
export function nllCurve(nll, base, width) {
  const height = 250;
  const [left, right, top, bottom, inner] = [44, 28, 26, 44, 26]; // inner: room below the lowest point for its value
  const finite = [...nll, base].filter(Number.isFinite);
  const steps = nll.length - 1;
  const middle = (Math.min(...finite) + Math.max(...finite)) / 2;
  const half = Math.max((Math.max(...finite) - Math.min(...finite)) / 2, 0.02) * 1.02;
  const x = (k) => (steps ? left + 14 + (k / steps) * (width - left - right - 14) : (left + width - right) / 2);
  const y = (value) => top + ((middle + half - value) / (2 * half)) * (height - top - bottom - inner);
  const points = nll.map((value, k) => ({ value, k })).filter(({ value }) => Number.isFinite(value));
  const gap = steps ? x(1) - x(0) : width;
  const missing = nll.map((value, k) => ({ value, k })).filter(({ value }) => !Number.isFinite(value));
  const labelled = ({ k }) => gap >= 46 || k === 0 || k === steps;

  const ticks = axisTicks(middle - half, middle + half);
  const root = svg("svg", { class: "curve", viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  root.append(svg("title", {}, `Prompt loss in nats per token: ${nll.map((v, k) => `${nllText(v)} after ${count(k, "step")}`).join(", ")}.`));
  for (const tick of ticks.values) {
    root.append(
      svg("line", { class: "gridline", x1: left, x2: width - right / 2, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "axis", x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(ticks.digits)),
    );
  }
  nll.forEach((_, k) => root.append(svg("text", { class: "axis", x: x(k), y: height - bottom + 22, "text-anchor": "middle" }, String(k))));
  root.append(svg("text", { class: "axis", x: (left + width - right) / 2 + 7, y: height - 4, "text-anchor": "middle" }, "steps taken"));
  if (Number.isFinite(base) && Math.abs(base - nll[0]) > 0.0005) {
    root.append(
      svg("line", { class: "reference", x1: left, x2: width - right / 2, y1: y(base), y2: y(base) }),
      svg("text", { class: "axis", x: width - right / 2, y: y(base) - 7, "text-anchor": "end" }, `base ${nllText(base)}`),
    );
  }
  root.append(svg("polyline", { class: "line", points: points.map(({ value, k }) => `${x(k)},${y(value)}`).join(" ") }));
  missing.forEach(({ k }) => root.append(svg("text", { class: "axis", x: x(k), y: height - bottom - 6, "text-anchor": k === steps ? "end" : "middle" }, "not finite")));
  points.forEach((point, i) => {
    const below = i > 0 && point.value <= points[i - 1].value; // the side that the line does not come from
    root.append(svg("circle", { class: "point", cx: x(point.k), cy: y(point.value), r: 4.5, "data-step": point.k, "data-nll": point.value }));
    if (labelled(point)) {
      root.append(svg("text", { class: "value", x: x(point.k), y: y(point.value) + (below ? 21 : -12), "text-anchor": "middle" }, nllText(point.value)));
    }
  });
  return root;
}

function axisTicks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const values = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) values.push(i * step);
  return { values, digits: [0, 1, 2, 3].find((d) => Math.abs(step * 10 ** d - Math.round(step * 10 ** d)) < 1e-9) ?? 4 };
}

export function nllTable(nll) {
  const rows = nll.map((value, k) => el("tr", {}, el("th", { scope: "row" }, String(k)), el("td", {}, nllText(value)),
    el("td", {}, Number.isFinite(value) && Number.isFinite(nll[k - 1]) ? signed(value - nll[k - 1]) : "")));
  return el("table", { class: "numbers-table" },
    el("thead", {}, el("tr", {}, ...["Steps taken", "Nats per token", "Change"].map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...rows));
}

const signed = (value) => (value < 0 ? `\u2212${(-value).toFixed(3)}` : `+${value.toFixed(3)}`);

// {layers, kinds, at(layer, kind, k)} of a trace; a projection without one of the known kinds goes by its own name.
export function readTrace({ projections, rates }) {
  const place = new Map(projections.map(({ layer, kind }, i) => [`${layer} ${kind}`, i]));
  const kinds = [...new Set(projections.map(({ kind }) => kind))];
  kinds.sort((a, b) => (KIND_ORDER.indexOf(a) + 1 || 9) - (KIND_ORDER.indexOf(b) + 1 || 9));
  return {
    layers: [...new Set(projections.map(({ layer }) => layer))].sort((a, b) => a - b),
    kinds,
    steps: rates.length,
    at: (layer, kind, k) => rates[k][place.get(`${layer} ${kind}`)],
    positive: rates.flat().filter((rate) => Number.isFinite(rate) && rate > 0),
  };
}

const kindName = (kind) => KINDS[kind]?.[1] ?? kind;
const kindLetter = (kind) => KINDS[kind]?.[0] ?? kind;

function heads(trace, { grid }) {
  const role = grid ? { role: "columnheader" } : {};
  const steps = Array.from({ length: trace.steps }, (_, k) => k);
  return el("thead", {},
    el("tr", {},
      el("th", { scope: "col", rowspan: 2, class: "corner", ...role }, "Layer"),
      ...steps.map((k) => el("th", { scope: "colgroup", colspan: trace.kinds.length, class: "step", ...role }, el("span", {}, "Step "), String(k + 1)))),
    el("tr", {}, ...steps.flatMap(() => trace.kinds.map((kind, i) => (
      el("th", { scope: "col", class: i === 0 ? "first" : null, ...role }, el("abbr", { title: kindName(kind) }, kindLetter(kind))))))));
}

export function rateTable(trace) {
  const rows = trace.layers.map((layer) => el("tr", {}, el("th", { scope: "row" }, String(layer)),
    ...cells(trace, layer, ({ rate }) => el("td", {}, rate === undefined ? "" : rateText(rate)))));
  return el("table", { class: "numbers-table" }, heads(trace, { grid: false }), el("tbody", {}, ...rows));
}

function cells(trace, layer, make) {
  return Array.from({ length: trace.steps }, (_, k) => k)
    .flatMap((k) => trace.kinds.map((kind, i) => make({ rate: trace.at(layer, kind, k), kind, k, first: i === 0 })));
}

// A grid with one tab stop: arrows, Home, End, Page Up and Page Down move within it, Escape hides the tooltip.
export function heatMap(trace) {
  const low = Math.floor(Math.log10(Math.min(...trace.positive)) + 1e-9);
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...trace.positive)) - 1e-9));
  const shade = (rate) => (rate > 0 ? Math.min(1, Math.max(0, (Math.log10(rate) - low) / (high - low))) : null);
  const crowded = trace.layers.length > 12;
  const tooltip = el("div", { class: "tooltip", "aria-hidden": "true", hidden: true });

  const body = el("tbody", {}, ...trace.layers.map((layer, row) => el("tr", { role: "row" },
    el("th", { scope: "row", role: "rowheader" }, el("span", { class: crowded && row % 5 ? "visually-hidden" : null }, String(layer))),
    ...cells(trace, layer, ({ rate, kind, k, first }) => {
      if (rate === undefined) return el("td", { role: "gridcell", class: first ? "first" : null });
      const t = shade(rate);
      return el("td", {
        role: "gridcell", tabindex: "-1", "data-rate": rate,
        class: ["cell", first && "first", t === null && "none"].filter(Boolean).join(" "),
        "aria-label": `Layer ${layer}, step ${k + 1}, ${kindName(kind)}: ${rateText(rate)}`,
        "--t": t ?? 0,
      });
    }))));
  const table = el("table", { class: "heat", role: "grid", "aria-label": "Learning rates by layer, step and projection", "--rows": trace.layers.length,
    "data-size": trace.layers.length > 40 ? "small" : crowded ? "medium" : "large" }, heads(trace, { grid: true }), body);
  const frame = el("div", { class: "heat-frame" }, table, tooltip);
  body.querySelector(".cell")?.setAttribute("tabindex", "0");

  const show = (cell) => {
    tooltip.textContent = cell.getAttribute("aria-label");
    tooltip.hidden = false;
    const [box, outer] = [cell.getBoundingClientRect(), frame.getBoundingClientRect()];
    const x = box.left + box.width / 2 - outer.left - tooltip.offsetWidth / 2;
    tooltip.style.setProperty("--x", `${Math.max(0, Math.min(x, outer.width - tooltip.offsetWidth))}px`);
    tooltip.style.setProperty("--y", `${box.top - outer.top - tooltip.offsetHeight - 6}px`);
  };
  const cellOf = (event) => event.target.closest?.(".cell");
  frame.addEventListener("pointerover", (event) => (cellOf(event) ? show(cellOf(event)) : (tooltip.hidden = true)));
  frame.addEventListener("pointerleave", () => { tooltip.hidden = true; });
  frame.addEventListener("focusin", (event) => {
    if (!cellOf(event)) return;
    body.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    cellOf(event).setAttribute("tabindex", "0");
    show(cellOf(event));
  });
  frame.addEventListener("focusout", () => { tooltip.hidden = true; });
  frame.addEventListener("keydown", (event) => {
    if (event.key === "Escape") tooltip.hidden = true;
    const cell = cellOf(event);
    if (!cell) return;
    const rows = [...body.rows].map((tr) => [...tr.querySelectorAll("td")]);
    const row = rows.findIndex((tds) => tds.includes(cell));
    const column = rows[row].indexOf(cell);
    const last = rows[row].length - 1;
    const moves = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: [row, 0], End: [row, last], PageUp: [Math.max(0, row - 10), column], PageDown: [Math.min(rows.length - 1, row + 10), column] };
    const [toRow, toColumn] = moves[event.key] ?? [];
    if (toRow === undefined) return;
    event.preventDefault();
    rows[toRow]?.[toColumn]?.focus();
  });
  return el("div", {}, legend(low, high), frame);
}

function legend(low, high) {
  const decades = high - low;
  const shades = 14;
  const every = Math.ceil(decades / 4);
  const ticks = [];
  for (let d = 0; d <= decades; d++) {
    if (d % every === 0) ticks.push(el("span", { "--at": d / decades }, low + d < -2 ? `1e${low + d}` : String(Number(`1e${low + d}`))));
  }
  return el("div", { class: "legend", "aria-hidden": "true" },
    el("div", { class: "swatches" }, ...Array.from({ length: shades }, (_, i) => el("span", { "--t": i / (shades - 1) }))),
    el("div", { class: "ticks" }, ...ticks));
}
