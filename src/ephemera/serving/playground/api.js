// Talking to the server: models, two kinds of streams, the adapter's zip, and one kind of error for all that can fail.

export class ApiError extends Error {
  // kind: "network" (no answer), "http" (an answer that says no), "broken" (an answer that ended too early)
  constructor(kind, message, { status = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, param, retryAfter });
  }
}

async function send(path, { key, body, accept, signal }) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  if (accept) headers.Accept = accept;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("network", "The server did not answer. See that it still runs, then try again.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const envelope = await response.json().catch(() => null);
  const error = envelope?.error ?? {};
  return new ApiError("http", error.message || `The server answered with status ${response.status}.`, {
    status: response.status,
    param: error.param ?? null,
    retryAfter: seconds(response.headers.get("Retry-After")),
  });
}

function seconds(value) { // Retry-After: a count, or a date
  if (value === null) return null;
  const count = /^\d+$/.test(value.trim()) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(count) ? Math.max(0, Math.ceil(count)) : null;
}

export async function listModels(key, signal) {
  const { data } = await (await send("/v1/models", { key, signal })).json();
  return data;
}

export async function downloadAdapter(body, { key, signal }) {
  const response = await send("/v1/adapt", { key, body, signal, accept: "application/zip" });
  const name = /filename="?([^";]+)/.exec(response.headers.get("Content-Disposition") ?? "")?.[1] ?? "adapter.zip";
  return { blob: await response.blob(), name };
}

// The text/event-stream format, by hand: yields {comment} and {data}. A line may end in \n, \r\n or \r.
export async function* serverSentEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/); // an \r at a chunk's end may be half of \r\n
      rest = done ? "" : lines.pop();
      for (const line of lines) {
        if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
        else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) {
          yield { data: data.join("\n") };
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Streams one answer; resolves to {finish, usage, extension} once the server has said [DONE].
export async function streamAnswer(path, body, { key, signal, onAdapting, onText }) {
  const response = await send(path, { key, body, signal, accept: "text/event-stream" });
  const result = { finish: null, usage: null, extension: null };
  try {
    for await (const { comment, data } of serverSentEvents(response.body)) {
      if (comment !== undefined) {
        const [, k, K] = /^adapting (\d+)\/(\d+)/.exec(comment) ?? [];
        if (k) onAdapting(Number(k), Number(K));
        continue;
      }
      if (data === "[DONE]") return result;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError("broken", chunk.error.message, { param: chunk.error.param ?? null });
      const choice = chunk.choices?.[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      if (text) onText(text);
      result.finish = choice?.finish_reason ?? result.finish;
      result.usage = chunk.usage ?? result.usage;
      result.extension = chunk.ephemera ?? result.extension;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("broken", "The connection broke before the answer was complete.");
  }
  throw new ApiError("broken", "The server ended the answer before it was complete.");
}
