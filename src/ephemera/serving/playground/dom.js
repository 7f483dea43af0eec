// Making elements, and writing numbers.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("--")) node.style.setProperty(name, value); // through the CSSOM, which a strict CSP allows
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
export const byId = (id) => document.getElementById(id);

export function rateText(value) {
  if (!Number.isFinite(value)) return "not finite";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.001 || size >= 10000) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

export const nllText = (value) => (Number.isFinite(value) ? value.toFixed(3) : "not finite");
export const secondsText = (value) => `${value.toFixed(value < 9.95 ? 2 : 1)} s`;
export const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
