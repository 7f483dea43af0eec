// A request as code that sends exactly it. The key is named, never written out.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`; // for a POSIX shell

export function curl(origin, path, body, withKey) {
  const lines = [`curl -N ${quoted(origin + path)}`, "-H 'Content-Type: application/json'"];
  if (withKey) lines.push('-H "Authorization: Bearer $EPHEMERA_API_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

function literal(value, indent = "") { // Python's; JSON's strings and numbers are Python's too
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map((item) => literal(item, indent)).join(", ")}]`;
  return `{${Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${literal(item, indent)}`).join(", ")}}`;
}

export function python(origin, path, { adapt, ...body }, withKey) {
  const chat = path.endsWith("/chat/completions");
  const settings = Object.entries(body).map(([name, value]) => `    ${name}=${literal(value)},`);
  if (adapt) settings.push(`    extra_body=${literal({ adapt })},`);
  const key = withKey ? 'os.environ["EPHEMERA_API_KEY"]' : '"none"';
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${origin}/v1`)}, api_key=${key})`,
    `stream = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...settings,
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    `        print(chunk.choices[0].${chat ? 'delta.content or ""' : "text"}, end="", flush=True)`,
    "",
  ].join("\n");
}
