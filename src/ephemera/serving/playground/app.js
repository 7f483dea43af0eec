// The page: a form, two streams side by side, and what the steps did.

import { answerColumn, problem } from "./answer.js";
import { downloadAdapter, listModels, streamAnswer } from "./api.js";
import { byId, count, el, nllText, rateText } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { heatMap, nllCurve, nllTable, rateTable, readTrace } from "./figures.js";
import { fittingFormat, isBase, methodHint, methodName, preferred } from "./methods.js";
import { curl, python } from "./snippets.js";
import { compare } from "./words.js";

const FIELDS = { prompt: "prompt", messages: "prompt", model: "method", max_tokens: "max-tokens", max_completion_tokens: "max-tokens",
  "adapt.steps": "steps", "adapt.seed": "seed", seed: "seed" };
const KEY_STORE = "ephemera-api-key";

const page = Object.fromEntries(["form", "prompt", "method", "steps", "seed", "key", "run", "stop", "banner", "download", "snippet", "copy"].map((id) => [id, byId(id)]));
page.maxTokens = byId("max-tokens");
const base = answerColumn(byId("base"), "The model's own answer.");
const adapted = answerColumn(byId("adapted"), "The answer after a few steps on the prompt.");
let models = [];
let running = null; // the AbortController of the run in progress
let shown = null; // what the figures show: {nll, baseNll}
let difference = null;

const checked = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const announce = (words) => { byId("announce").textContent = words; };
const baseModel = () => models.find(isBase);
const chosen = () => models.find(({ id }) => id === page.method.value);

// ---- the form ----

function fieldError(id, message) {
  const place = byId(`${id}-error`);
  place.textContent = message ?? "";
  place.hidden = !message;
  if (message) byId(id).setAttribute("aria-invalid", "true");
  else byId(id).removeAttribute("aria-invalid");
}

function clearErrors() {
  for (const id of ["prompt", "method", "steps", "max-tokens", "seed", "key"]) fieldError(id, null);
  page.banner.hidden = true;
  page.banner.replaceChildren();
}

let wantedSteps = null; // until someone writes a number, as many as the method was made for
function fitMethod() { // the format and the steps that suit the method
  const model = chosen();
  if (!model) return;
  const format = fittingFormat(model, checked("format"));
  document.querySelector(`input[name="format"][value="${format}"]`).checked = true;
  page.download.disabled = isBase(model);
  fitSteps();
}

function fitSteps() {
  const model = chosen();
  if (!model) return;
  const most = model.max_steps;
  byId("method-hint").textContent = methodHint(model);
  byId("steps-hint").textContent = model.generates ? `Blank: a generator makes the adapter. Or steps: 0 to ${most}.` : most === 0 ? "This method takes no steps." : most === null ? "Steps: 0 or more." : `Steps: 0 to ${most}.`;
  page.steps.disabled = most === 0;
  page.steps.max = most ?? "";
  page.steps.value = wantedSteps === null && model.generates ? "" : Math.min(wantedSteps ?? model.steps ?? 1, most ?? Infinity);
  fieldError("steps", null);
}

function whole(input, name, least) {
  const most = input.max === "" ? Infinity : Number(input.max);
  const value = Number(input.value);
  const fine = input.value.trim() !== "" && Number.isInteger(value) && value >= least && value <= most;
  fieldError(input.id, fine ? null : `${name}: a whole number ${most === Infinity ? `of at least ${least}` : `from ${least} to ${most}`}.`);
  return fine;
}

function valid() {
  clearErrors();
  if (!page.prompt.value.trim()) fieldError("prompt", "Write a prompt, or choose an example.");
  if (!unasked()) whole(page.steps, "Steps", 0);
  whole(page.maxTokens, "Max tokens", 1);
  whole(page.seed, "Seed", 0);
  const wrong = page.form.querySelector("[aria-invalid]");
  wrong?.focus();
  if (wrong) announce(byId(`${wrong.id}-error`).textContent);
  return !wrong;
}

// No steps are asked for, so that the method's generator makes the adapter.
const unasked = () => Boolean(chosen()?.generates) && page.steps.value.trim() === "";

function request(model) {
  const chat = checked("format") === "chat";
  const text = page.prompt.value;
  const adapt = { ...(unasked() ? {} : { steps: Number(page.steps.value) }), seed: Number(page.seed.value), trace: true };
  const body = {
    model: model.id,
    ...(chat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
    max_tokens: Number(page.maxTokens.value),
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
    adapt: isBase(model) ? { trace: true } : adapt, // with the trace comes the loss after the last step
  };
  return { path: chat ? "/v1/chat/completions" : "/v1/completions", body };
}

function refreshSnippet() {
  const ready = Boolean(chosen() && page.prompt.value.trim());
  page.copy.disabled = !ready;
  page.snippet.classList.toggle("placeholder", !ready);
  if (!ready) return void (page.snippet.textContent = "The request for this prompt and these settings appears here.");
  const { path, body } = request(chosen());
  page.snippet.textContent = (checked("snippet") === "curl" ? curl : python)(location.origin, path, body, Boolean(page.key.value));
}

// ---- the server's models ----

function serverIs(state, words) {
  byId("served").dataset.state = state;
  byId("served").textContent = words;
}

async function loadModels() {
  serverIs("loading", "Connecting to the server");
  try {
    models = await listModels(page.key.value);
  } catch (error) {
    serverIs("down", error.status === 401 ? "Waiting for an API key" : "Not connected");
    page.method.replaceChildren(el("option", {}, "Unknown"));
    page.method.disabled = page.run.disabled = page.download.disabled = true;
    return report(error, loadModels);
  }
  clearErrors();
  const before = page.method.value;
  const choices = [...models.filter((model) => !isBase(model)), baseModel()];
  page.method.replaceChildren(...choices.map(({ id, method }) => el("option", { value: id }, methodName(method))));
  page.method.value = (choices.find(({ id }) => id === before) ?? preferred(models)).id;
  page.method.disabled = page.run.disabled = false;
  serverIs("ready", baseModel().id);
  base.name("Without an adapter");
  fitMethod();
  nameAdapted();
  refreshSnippet();
}

const nameAdapted = () => adapted.name(isBase(chosen()) ? "Choose a method to compare with" : unasked() ? methodName(chosen().method)
  : `${methodName(chosen().method)}, ${count(Number(page.steps.value), "step")}`);

// An error that belongs to the page as a whole.
function report(error, retry) {
  if (error.kind === "network") serverIs("down", "Not connected");
  page.banner.replaceChildren(problem(error, retry));
  page.banner.hidden = false;
  blame(error);
  announce(error.message);
}

function blame(error) { // the field that the server names
  if (error.status === 401) {
    fieldError("key", page.key.value ? "The server does not accept this key." : "The server asks for a key.");
    page.key.focus();
  } else if (FIELDS[error.param]) fieldError(FIELDS[error.param], error.message);
}

// ---- a run ----

async function run() {
  if (running || page.run.disabled || !valid()) return;
  const control = new AbortController();
  begin(control);
  const pairs = [[base, request(baseModel())], ...(isBase(chosen()) ? [] : [[adapted, request(chosen())]])];
  const outcomes = await Promise.allSettled(pairs.map(([column, { path, body }]) => {
    column.start();
    return streamAnswer(path, body, { key: page.key.value, signal: control.signal, onAdapting: column.adapting, onText: column.add })
      .then((result) => { column.finish(result); return result; });
  }));
  end();
  const errors = outcomes.map(({ reason }) => reason ?? null);
  if (errors.some((error) => error?.name === "AbortError")) {
    pairs.forEach(([column], i) => errors[i] && column.stop());
    return announce("Stopped.");
  }
  const same = errors.every((error) => error && error.message === errors[0].message);
  if (same && !base.text && !adapted.text) {
    base.empty();
    adapted.empty();
    return report(errors[0], run);
  }
  errors.forEach((error, i) => {
    if (!error) return;
    pairs[i][0].fail(error, run);
    blame(error);
  });
  const last = outcomes.at(-1);
  if (last.value) showInside(last.value.extension, outcomes[0].value?.extension);
  const longest = Math.max(base.total ?? 0, adapted.total ?? 0);
  [base, adapted].forEach((column) => column.compareTimes(longest));
  byId("timing-note").hidden = errors.some(Boolean);
  if (errors.some(Boolean)) return announce(errors.find(Boolean).message);
  if (pairs.length === 1) return announce("The answer is complete.");
  showDifference(last.value.extension?.note);
}

function begin(control) {
  running = control;
  serverIs("ready", baseModel().id);
  difference = null;
  nameAdapted();
  byId("changed").hidden = byId("mark-control").hidden = byId("timing-note").hidden = true;
  const focused = document.activeElement === page.run;
  byId("stale").hidden = shown === null;
  page.run.hidden = byId("shortcut").hidden = true;
  page.stop.hidden = false;
  if (focused) page.stop.focus();
  if (isBase(chosen())) adapted.empty();
  announce(isBase(chosen()) ? "Running. The answer is on its way." : "Running. Both answers are on their way.");
}

function end() {
  running = null;
  const focused = document.activeElement === page.stop;
  page.run.hidden = byId("shortcut").hidden = false;
  page.stop.hidden = true;
  if (focused) page.run.focus();
}

function showDifference(note) {
  difference = compare(base.text.trim(), adapted.text.trim());
  const { changed, dropped, total } = difference;
  const same = changed === 0 && dropped === 0;
  const words = same && total === 0 ? "Both answers are empty." : same ? "The answers are the same, word for word."
    : changed === 0 ? `The adapted answer leaves out ${count(dropped, "word")}.`
      : `${changed} of ${count(total, "word")} changed.`;
  byId("changed").textContent = words;
  byId("changed").hidden = false;
  byId("mark-control").hidden = same;
  markChanges();
  announce(`Both answers are complete. ${words} ${note ?? ""}`.trim());
}

function markChanges() {
  if (!difference) return;
  const on = byId("mark").checked;
  base.show(on ? difference.base : null, "del");
  adapted.show(on ? difference.adapted : null, "ins");
}

// ---- what the steps did ----

function showInside(extension, baseExtension) {
  const nll = extension?.prompt_nll ?? [];
  byId("figures").hidden = nll.length === 0;
  byId("stale").hidden = true;
  byId("inside-empty").hidden = nll.length > 0;
  if (!nll.length) return;
  shown = { nll, baseNll: baseExtension?.prompt_nll?.[0] ?? null };
  const [first, last] = [nll[0], nll.at(-1)];
  const steps = extension.steps_taken ?? nll.length - 1;
  byId("curve-note").textContent = steps === 0 ? `${nllText(first)} nats per token; no steps were taken.`
    : extension.reach === "answer" ? `${nllText(first)} nats per token before the first step. The adapter acts on the answer alone, so the prompt keeps this loss.`
    : Number.isFinite(last) ? `From ${nllText(first)} to ${nllText(last)} nats per token. The steps lower this loss; it does not measure the answer.`
      : "The loss stopped being finite.";
  byId("curve-table").replaceChildren(nllTable(nll));
  drawCurve();

  const trace = extension.trace?.rates.length ? readTrace(extension.trace) : null;
  const drawable = Boolean(trace?.positive.length);
  byId("heat-details").hidden = !trace;
  byId("heat-map").replaceChildren(drawable ? heatMap(trace) : "");
  byId("heat-table").replaceChildren(trace ? rateTable(trace) : "");
  byId("heat-note").textContent = !trace ? "No steps were taken, so there are no rates." : !drawable ? "No rate is above zero." : rangeText(trace);
}

function rangeText({ positive, layers, steps }) {
  const [least, most] = [rateText(Math.min(...positive)), rateText(Math.max(...positive))];
  const size = `${count(layers.length, "layer")}, ${count(steps, "step")}`;
  return least === most ? `${most} everywhere: ${size}.` : `${least} to ${most}, on a logarithmic scale: ${size}.`;
}

function drawCurve() {
  const place = byId("curve-plot");
  if (shown && place.clientWidth) place.replaceChildren(nllCurve(shown.nll, shown.baseNll, Math.min(place.clientWidth, 560)));
}

// ---- taking it away ----

async function copySnippet() {
  try {
    await navigator.clipboard.writeText(page.snippet.textContent);
  } catch { // no clipboard outside a secure context
    getSelection().selectAllChildren(page.snippet);
    document.execCommand("copy");
  }
  page.copy.textContent = "Copied";
  announce("Copied.");
  setTimeout(() => { page.copy.textContent = "Copy"; }, 2000);
}

async function download() {
  if (!valid()) return;
  const { body } = request(chosen());
  const status = byId("download-status");
  const asked = { model: body.model, ...(body.prompt === undefined ? { messages: body.messages } : { prompt: body.prompt }),
    adapt: { ...body.adapt, trace: undefined }, adapter: true };
  page.download.disabled = true;
  status.textContent = "Adapting to the prompt";
  try {
    const { blob, name } = await downloadAdapter(asked, { key: page.key.value });
    const link = el("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    status.textContent = `${name}, ${(blob.size / 1024).toFixed(0)} KB`;
  } catch (error) {
    status.textContent = error.retryAfter ? `${error.message} Try again in ${error.retryAfter} s.` : error.message;
    blame(error);
  }
  page.download.disabled = false;
  announce(status.textContent);
}

// ---- wiring ----

page.form.addEventListener("submit", (event) => { event.preventDefault(); run(); });
page.stop.addEventListener("click", () => running?.abort());
page.method.addEventListener("change", fitMethod);
page.steps.addEventListener("input", () => { wantedSteps = page.steps.value.trim() === "" ? null : Number(page.steps.value); });
page.form.addEventListener("input", refreshSnippet);
page.form.addEventListener("change", refreshSnippet);
page.prompt.addEventListener("input", () => fieldError("prompt", null));
page.key.addEventListener("change", () => { sessionStorage.setItem(KEY_STORE, page.key.value); loadModels(); });
document.querySelectorAll('input[name="snippet"]').forEach((radio) => radio.addEventListener("change", refreshSnippet));
page.copy.addEventListener("click", copySnippet);
page.download.addEventListener("click", download);
byId("mark").addEventListener("change", markChanges);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  }
});
byId("examples").append(...EXAMPLES.map(({ name, prompt }) => el("button", {
  type: "button", class: "quiet",
  onclick: () => { page.prompt.value = prompt; fieldError("prompt", null); refreshSnippet(); },
}, name)));
if (/mac|iphone|ipad/i.test(navigator.userAgent)) byId("shortcut").firstElementChild.textContent = "\u2318";
page.key.value = sessionStorage.getItem(KEY_STORE) ?? "";
new ResizeObserver(drawCurve).observe(byId("curve-plot"));
refreshSnippet();
loadModels();
