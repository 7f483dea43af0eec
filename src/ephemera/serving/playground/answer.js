// One column: what a stream is doing, its text, its times, or why there is none.

import { count, el, secondsText } from "./dom.js";

const TITLES = { 400: "The request was refused", 401: "An API key is needed", 403: "The request was refused", 404: "No such model",
  413: "Too long for this server", 422: "The request was refused", 429: "The server is busy", 503: "The server cannot answer now", 504: "The request took too long" };
const KIND_TITLES = { network: "No connection", broken: "The answer broke off" };

// What went wrong, what the server said, the field it named, and a way to try again that waits as long as it asks.
export function problem(error, retry) {
  const title = KIND_TITLES[error.kind] ?? TITLES[error.status] ?? "The server failed";
  const facts = [error.status && `Status ${error.status}`, error.param && `${error.status ? "field" : "Field"} ${error.param}`].filter(Boolean).join(", ");
  const button = el("button", { type: "button", onclick: () => button.getAttribute("aria-disabled") !== "true" && retry() }, "Try again");
  if (error.retryAfter) {
    const until = Date.now() + 1000 * error.retryAfter;
    const tick = () => {
      const left = Math.ceil((until - Date.now()) / 1000);
      button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      button.setAttribute("aria-disabled", String(left > 0));
      if (left > 0 && (button.isConnected || left === error.retryAfter)) setTimeout(tick, 250);
    };
    tick();
  }
  return el("div", { class: "problem" },
    el("p", { class: "problem-title" }, title), el("p", {}, error.message), facts ? el("p", { class: "facts" }, facts) : null, button);
}

// What the server says of an answer; that the model was left as it is stands out.
function noteOf(note) {
  const reason = /^abstained\b[:;,.]?\s*(.*)$/is.exec(note)?.[1];
  return reason === undefined ? el("p", { class: "note" }, el("strong", {}, "Note: "), note)
    : el("p", { class: "note" }, el("span", { class: "badge" }, "Abstained"), " ", reason);
}

export function answerColumn(root, emptyText) {
  const subtitle = el("p", { class: "subtitle" });
  const progress = el("div", { class: "progress", hidden: true });
  const text = el("div", { class: "text" });
  const aside = el("div", { class: "aside" });
  const bar = el("div", { class: "bar", "aria-hidden": "true", hidden: true });
  const times = el("dl", { class: "times", hidden: true });
  root.append(subtitle, progress, text, aside, bar, times);
  const state = { text: "", started: 0, firstToken: null, total: null, adapting: 0 };
  const now = () => (performance.now() - state.started) / 1000;
  const become = (name) => { root.dataset.state = name; };
  const waitFor = (label, ticks = []) => {
    progress.replaceChildren(el("span", { class: "steps-done", "aria-hidden": "true" }, ...ticks), el("span", {}, label));
    progress.hidden = false;
  };
  const placeholder = (words) => text.replaceChildren(el("p", { class: "placeholder" }, words));
  const entry = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));
  const showTimes = (...more) => {
    times.replaceChildren(
      ...(state.firstToken === null ? [] : [entry("First token", secondsText(state.firstToken))]),
      ...(state.total === null ? [] : [entry("Total", secondsText(state.total))]), ...more);
    times.hidden = times.children.length === 0;
  };

  const column = {
    get text() { return state.text; },
    get total() { return state.total; },
    empty() {
      Object.assign(state, { text: "", firstToken: null, total: null });
      progress.hidden = bar.hidden = times.hidden = true;
      aside.replaceChildren();
      placeholder(emptyText);
      become("empty");
    },
    name(words) { subtitle.textContent = words; },
    start() {
      column.empty();
      state.started = performance.now();
      text.replaceChildren();
      waitFor("Waiting for the server");
      become("waiting");
    },
    adapting(k, K) {
      waitFor(`Adapting to the prompt, step ${k} of ${K}`, Array.from({ length: K }, (_, i) => el("i", { class: i < k - 1 ? "done" : i === k - 1 ? "now" : null })));
      become("adapting");
    },
    add(piece) {
      if (state.firstToken === null) {
        state.firstToken = now();
        progress.hidden = true;
        become("streaming");
        showTimes();
      }
      text.append(state.text.trim() ? piece : piece.trimStart()); // no empty lines above an answer
      state.text += piece;
    },
    finish({ finish, usage, extension }) {
      state.total = now();
      progress.hidden = true;
      become("done");
      column.show();
      if (extension?.note) aside.append(noteOf(extension.note));
      if (finish === "length") aside.append(el("p", { class: "footnote" }, "Cut at the token limit."));
      state.adapting = extension?.adapt_seconds ?? 0;
      showTimes(...(usage ? [entry("Tokens", String(usage.completion_tokens))] : []),
        ...(state.adapting ? [entry("Adapting", secondsText(state.adapting))] : []));
    },
    // The answer as runs of {text, changed}, or plain.
    show(runs = null, tag = "ins") {
      if (!state.text.trim()) return placeholder("The model ended its answer at once: it is empty.");
      text.replaceChildren(...(runs?.map((run) => (run.changed ? el(tag, {}, run.text) : run.text)) ?? [state.text.trim()]));
    },
    compareTimes(longest) { // adapting, then to the first token, then the rest, on the scale of the slower answer
      if (state.firstToken === null || state.total === null) return;
      const adapting = Math.min(state.adapting, state.firstToken);
      const parts = [["adapt", adapting], ["prefill", state.firstToken - adapting], ["decode", state.total - state.firstToken]];
      bar.replaceChildren(...parts.map(([name, length]) => el("span", { class: name, "--share": length / longest })).filter((_, i) => parts[i][1] > 0));
      bar.hidden = false;
    },
    stop() {
      progress.hidden = true;
      if (!state.text) placeholder("Stopped before the first token.");
      else aside.append(el("p", { class: "footnote" }, `Stopped after ${count(state.text.trim().split(/\s+/).length, "word")}.`));
      become("stopped");
    },
    fail(error, retry) {
      progress.hidden = true;
      if (!state.text) text.replaceChildren();
      aside.replaceChildren(problem(error, retry));
      become("error");
    },
  };
  column.empty();
  return column;
}
