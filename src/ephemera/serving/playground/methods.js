// What methods are called, what they do, and which one a page begins with.

const NAMES = { none: "No adapter", universal: "Universal", fixed: "Fixed rate", stepwise: "Step-wise", layerwise: "Layer-wise",
  constant: "Constants", averaged: "Averaged", peft: "PEFT adapter" };
const HINTS = {
  none: "The model itself.",
  universal: "What ships for this model: a generator for chats; with steps, a network that predicts a rate for each layer.",
  fixed: "One rate for every layer and step.",
  stepwise: "A network predicts one rate for each step.",
  layerwise: "A network predicts a rate for each layer and step.",
  constant: "A trained rate for each layer, the same for every prompt.",
  averaged: "The network's rates, averaged over its training prompts.",
  peft: "An adapter that was trained before.",
};
const FORMATS = { chat: "chat prompts", plain: "plain prompts" };

export const isBase = ({ method }) => !method || method === "none";

export function methodName(method) {
  const [start, rate] = method.startsWith("generated") ? ["Generated", method.split("+")[1]] : [null, method];
  if (!start) return NAMES[rate] ?? rate;
  return rate ? `${start}, then ${(NAMES[rate] ?? rate).toLowerCase()}` : start;
}

export function methodHint({ method, format, reach }) {
  const rate = method.startsWith("generated") ? method.split("+")[1] : method;
  const does = !method.startsWith("generated") ? HINTS[rate] ?? ""
    : `A generator writes the adapter in one pass${rate ? ", then steps refine it" : ", and no steps follow"}. ${rate ? HINTS[rate] ?? "" : ""}`;
  const made = format?.length === 1 && method !== "none" ? `Trained on ${FORMATS[format[0]]}.` : "";
  return [does.trim(), reach === "answer" ? "It acts on the answer alone." : "", made].filter(Boolean).join(" ");
}

// The networks that ship, else one that the server was started with, else the model itself.
export function preferred(models) {
  return models.find(({ method }) => method === "universal") ?? models.find((model) => !isBase(model) && model.method !== "fixed")
    ?? models.find(isBase);
}

// "chat" or "completion": as a method's network was trained, or as the page has it where that fits too.
export function fittingFormat({ format }, now) {
  const name = now === "chat" ? "chat" : "plain";
  if (!format?.length || format.includes(name)) return now;
  return format[0] === "chat" ? "chat" : "completion";
}
