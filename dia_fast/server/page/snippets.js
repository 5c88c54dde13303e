/** The present request as a program for somebody else's shell or editor. */

/** JSON of a request. A seed has up to 64 bits, more than a number of JavaScript holds: it is kept as text. */
export function encode(fields, seed, indent) {
  const rest = JSON.stringify(fields, null, indent);
  if (!seed) return rest;
  return indent ? rest.replace(/\n}$/, `,\n${" ".repeat(indent)}"seed": ${seed}\n}`) : rest.replace(/}$/, `,"seed":${seed}}`);
}

const RECORDING = "a recording of this page";

export function snippet(kind, { base, fields, seed, key }) {
  const { ref_audio: sound, ...plain } = fields;
  return kind === "curl" ? curl(base, plain, seed, key, sound) : python(base, plain, seed, key, sound);
}

function curl(base, fields, seed, key, sound) {
  const lines = [`curl ${base}/audio/speech`];
  if (key) lines.push(`  -H "Authorization: Bearer $DIA_FAST_API_KEY"`);
  lines.push(`  -H "Content-Type: application/json"`);
  const body = encode(fields, seed, 2).replaceAll("'", "'\\''");
  lines.push(sound ? "  -d @-" : `  -d '${body}'`, `  -o speech.${fields.response_format}`);
  const command = lines.join(" \\\n");
  if (!sound) return command;
  // Too long for an argument: it goes through a pipe.
  const start = body.replace(/\n}$/, `,\n  "ref_audio": "data:audio/wav;base64,`);
  return `# recording.wav: ${RECORDING}\n(printf %s '${start}'; base64 < recording.wav | tr -d '\\n'; printf '"}') |\n${command}`;
}

const NAMED = ["model", "voice", "input", "response_format", "speed"];

function python(base, fields, seed, key, sound) {
  const named = NAMED.filter((name) => name in fields).map((name) => `    ${name}=${JSON.stringify(fields[name])},`);
  if (!("voice" in fields)) named.splice(1, 0, '    voice="dialogue",');
  const more = Object.entries(fields).filter(([name]) => !NAMED.includes(name)).map(([name, value]) => `"${name}": ${JSON.stringify(value)}`);
  if (seed) more.push(`"seed": ${seed}`);
  if (sound) more.push(`"voice": None`, `"ref_audio": "data:audio/wav;base64," + recording`);
  if (more.length) named.push(`    extra_body={${more.join(", ")}},`);
  return [
    ...(sound ? ["import base64", "from pathlib import Path", ""] : []),
    ...(key ? ["import os", ""] : []),
    "import openai",
    "",
    ...(sound ? [`recording = base64.b64encode(Path("recording.wav").read_bytes()).decode()  # ${RECORDING}`] : []),
    `client = openai.OpenAI(base_url="${base}", api_key=${key ? 'os.environ["DIA_FAST_API_KEY"]' : '"none"'})`,
    "speech = client.audio.speech.create(",
    ...named,
    ")",
    `speech.write_to_file("speech.${fields.response_format}")`,
  ].join("\n");
}
