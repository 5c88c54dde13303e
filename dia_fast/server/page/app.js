import * as history from "./history.js";
import { Player } from "./player.js";
import { DEMO, DIA, SOUNDS } from "./presets.js";
import { dataUrl, decode, fromInt16, microphone, toInt16, wav } from "./recording.js";
import { encode, snippet } from "./snippets.js";
import { Waveform } from "./waveform.js";

const $ = (id) => document.getElementById(id);
const RECORDING = "*recording"; // no voice of a server has an asterisk in its name
const LONGEST = 35; // seconds of a recording
const SLIDERS = [
  ["guidance_scale", "Guidance", 1, 8, 0.1, "how closely to follow the text"],
  ["temperature", "Temperature", 0, 2, 0.05, "higher is livelier, and less reliable"],
  ["top_p", "Top p", 0.05, 1, 0.05, "share of the likeliest codes"],
  ["top_k", "Top k", 0, 200, 1, "most candidates; 0 is all"],
  ["speed", "Speed", 0.25, 4, 0.05, "keeps the pitch"],
];

const player = new Player();
const waveform = new Waveform($("wave"), $("app").nonce, (seconds) => player.seek(seconds));
let about, underWay = null, estimate = 1, recording = null, sound = null;

// Small helpers

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  return `${Math.floor(tenths / 600)}:${String(Math.floor(tenths / 10) % 60).padStart(2, "0")}.${tenths % 10}`;
}

function remember(name, value) {
  try { localStorage.setItem(`dia-fast.${name}`, JSON.stringify(value)); } catch { /* storage is switched off */ }
}

function recall(name) {
  try { return JSON.parse(localStorage.getItem(`dia-fast.${name}`)); } catch { return null; }
}

function key() {
  return $("key").value.trim();
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) throw new Error((await answer.json().catch(() => null))?.error?.message ?? `the server answers ${answer.status}`);
  return answer;
}

function post(path, body, signal) {
  return call(path, { method: "POST", body, signal, headers: { "Content-Type": "application/json" } });
}

function fail(error) {
  const gone = error instanceof TypeError; // how fetch says that nobody answers
  $("error").textContent = gone ? "The server cannot be reached." : `${error.message[0].toUpperCase()}${error.message.slice(1)}.`.replace(/([.?!])\.$/, "$1");
  $("error").hidden = false;
}

function excuse() { $("error").hidden = true; }

// The server

async function begin() {
  about = await (await fetch("page/about.json", { cache: "no-store" })).json();
  document.title = `${about.model} · dia-fast`;
  $("about").textContent = `dia-fast ${about.version}, serving ${about.model}`;
  $("key-card").hidden = !about.key_needed;
  $("keep-group").hidden = !about.uploads;
  fillScripts();
  fillSliders();
  $("format").append(...about.formats.map((name) => make("option", { value: name, textContent: name })));
  restore();
  await showHistory();
  await untilReady();
}

/** A model has defaults of its own, known once it is loaded. */
async function learnDefaults() {
  about = await (await fetch("page/about.json", { cache: "no-store" })).json();
  for (const [name] of SLIDERS) set(name, recall("values")?.[name] ?? about.defaults[name]);
}

async function untilReady() {
  for (;;) {
    const state = await fetch("ready").then((answer) => answer.json()).then((found) => found.status, () => "unreachable");
    $("server").dataset.state = state;
    $("server-text").textContent = state === "ready" ? about.model : state;
    if (state === "ready") break;
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  await learnDefaults();
  await showVoices().catch(about.key_needed && !key() ? () => {} : fail);
  await judge();
}

// The script

function fillScripts() {
  const demo = about.vocabulary.length > 0, scripts = demo ? DEMO : DIA;
  for (const [name, text] of Object.entries(scripts)) $("presets").append(make("option", { value: text, textContent: name }));
  const button = (text, kind) => make("button", { type: "button", textContent: text, className: `tag ${kind}` });
  $("tags").append(button("[S1]", "s1"), button("[S2]", "s2"), ...(demo ? [] : SOUNDS.map((name) => button(`(${name})`, "sound"))));
  $("words").hidden = !demo;
  $("words-count").textContent = about.vocabulary.length;
  $("vocabulary").append(...about.vocabulary.map((word) => button(word, "sound")));
}

function insert(text) {
  const area = $("text"), before = area.value.slice(0, area.selectionStart), after = area.value.slice(area.selectionEnd);
  const turn = text.startsWith("[");
  const left = !before.trim() || before.endsWith("\n") ? "" : turn ? "\n" : before.endsWith(" ") ? "" : " ";
  const right = after.startsWith(" ") || after.startsWith("\n") || /^[.,?!]/.test(after) ? "" : " ";
  area.focus();
  // The only way that leaves the undo of the browser alone.
  if (!document.execCommand("insertText", false, left + text + right)) {
    area.setRangeText(left + text + right, area.selectionStart, area.selectionEnd, "end");
    area.dispatchEvent(new Event("input"));
  }
}

function paint() {
  const text = $("text").value, parts = text.split(/(\[S[12]\]|\([a-z ]+\))/);
  $("backdrop").replaceChildren(...parts.map((part) => {
    const kind = part === "[S1]" ? "s1" : part === "[S2]" ? "s2" : /^\([a-z ]+\)$/.test(part) ? "sound" : "";
    return kind ? make("mark", { className: kind, textContent: part }) : part;
  }), "\n");
  $("backdrop").scrollTop = $("text").scrollTop;
}

let judging;

async function judge() {
  judging?.abort();
  judging = new AbortController();
  const text = $("text").value;
  if (!text.trim() || (about.key_needed && !key())) {
    show({ seconds: 0, bytes: 0, warnings: [], error: null });
    return;
  }
  try {
    show(await (await post("v1/audio/text", JSON.stringify({ input: text }), judging.signal)).json());
  } catch { /* what is wrong is told when it is spoken */ }
}

function show(report) {
  estimate = Math.max(1, report.seconds / value("speed"));
  $("seconds").textContent = `about ${report.seconds.toFixed(1)} s of speech`;
  $("bytes").textContent = `${report.bytes.toLocaleString("en")} bytes`;
  const lines = report.error ? [report.error] : report.warnings;
  $("warnings").replaceChildren(...lines.map((line) => make("li", { textContent: line })));
}

// Voices

async function showVoices(wanted = $("voice").value || recall("voice")) {
  const found = (await (await call("v1/audio/voices")).json()).data;
  const group = (label, list) => make("optgroup", { label }, ...list.map((item) => make("option", { value: item.id, textContent: item.name })));
  const of = (kind) => found.filter((item) => item.type === kind);
  const groups = [["Recordings", of("recording")], ["Dialogue", of("builtin")], ["A seed each", of("seed")]];
  if (recording?.used) groups.unshift(["This page", [{ id: RECORDING, name: "Your recording" }]]);
  $("voice").replaceChildren(...groups.filter(([, list]) => list.length).map(([label, list]) => group(label, list)));
  const known = [...$("voice").options].map((option) => option.value);
  $("voice").value = known.includes(wanted) ? wanted : "dialogue";
  $("voice").dataset.recordings = JSON.stringify(of("recording").map((item) => item.id));
  voiceChosen();
}

function voiceChosen() {
  const recordings = JSON.parse($("voice").dataset.recordings ?? "[]");
  $("forget").hidden = !(about.uploads && recordings.includes($("voice").value));
  if ($("voice").value !== RECORDING) remember("voice", $("voice").value);
}

async function heard(blob, from) {
  try {
    const found = await decode(blob);
    if (found.seconds < 2 || found.seconds > LONGEST) throw new Error(`it is ${found.seconds.toFixed(1)} s long; 2 to ${LONGEST} s work`);
    recording = { ...found, blob: wav(found.samples, found.rate) };
    $("recorded").textContent = `${from}: ${found.seconds.toFixed(1)} s. `;
    $("recorded").append(make("button", { type: "button", className: "quiet", textContent: "Listen", onclick: () => {
      if (underWay) return;
      player.load(fromInt16(found.samples), found.rate);
      sound = null;
      player.play();
    } }));
  } catch (error) {
    recording = null;
    $("recorded").textContent = `${from}: ${error.message}.`;
  }
  recordingChanged();
}

function recordingChanged() {
  const usable = recording !== null && $("ref-text").value.trim() !== "";
  $("use").disabled = !usable;
  $("keep").disabled = !(usable && $("consent").checked && $("voice-name").value && $("voice-name").validity.valid);
}

let running = null;

async function record() {
  if (running) {
    const done = running;
    running = null;
    $("record").textContent = "Record";
    await heard(await done.stop(), "Microphone");
    return;
  }
  try {
    $("record").disabled = true;
    $("recorded").textContent = "Waiting for the microphone…";
    running = await microphone((seconds) => {
      $("recorded").textContent = `Recording… ${Math.floor(seconds)} s`;
      if (running && seconds > LONGEST - 1) record();
    });
    $("record").textContent = "Stop recording";
  } catch (error) {
    $("recorded").textContent = `${error.message[0].toUpperCase()}${error.message.slice(1)}.`;
  } finally {
    $("record").disabled = false;
  }
}

async function useRecording() {
  recording.used = { url: await dataUrl(recording.blob), text: $("ref-text").value };
  await showVoices(RECORDING);
}

async function keepRecording() {
  const form = new FormData(), name = $("voice-name").value;
  form.append("audio_sample", recording.blob, `${name}.wav`);
  form.append("name", name);
  form.append("ref_text", $("ref-text").value);
  form.append("consent", "given by whoever uploaded it");
  await call("v1/audio/voices", { method: "POST", body: form });
  $("recorded").textContent = `Kept as ${name}.`;
  await showVoices(name);
}

async function forgetVoice() {
  const name = $("voice").value;
  if (!confirm(`Delete the voice ${name} from the server?`)) return;
  await call(`v1/audio/voices/${encodeURIComponent(name)}`, { method: "DELETE" });
  await showVoices("dialogue");
}

// Delivery

function fillSliders() {
  for (const [name, label, least, most, step, help] of SLIDERS) {
    if (name === "speed" && !about.speed) continue;
    const input = make("input", { type: "range", id: name, min: least, max: most, step });
    const output = make("output", { id: `${name}-value` });
    output.htmlFor = name;
    $("sliders").append(make("div", { className: "slider" },
      make("label", { htmlFor: name, textContent: label }), output, input, make("span", { className: "small", id: `${name}-help`, textContent: help })));
    input.setAttribute("aria-describedby", `${name}-help`);
    input.addEventListener("input", slid);
    set(name, about.defaults[name]);
  }
}

function value(name) { return $(name) ? Number($(name).value) : about.defaults[name]; }

function set(name, number) {
  if (!$(name)) return;
  $(name).value = number;
  $(`${name}-value`).value = Number(Number(number).toFixed(2));
}

function slid() {
  for (const [name] of SLIDERS) if ($(name)) $(`${name}-value`).value = Number(value(name).toFixed(2));
  remember("values", Object.fromEntries(SLIDERS.filter(([name]) => $(name)).map(([name]) => [name, value(name)])));
}

function locked() { return $("lock").getAttribute("aria-pressed") === "true"; }

function lock(on) {
  $("lock").setAttribute("aria-pressed", String(on));
  $("seed-help").textContent = on ? "Kept: the same seed speaks the same text the same way." : "A new one each time; lock it to speak the same way again.";
  remember("seed", on ? $("seed").value : null);
}

// Speaking

/** The fields of a request as the form has them; its seed apart, as text. */
function request(format) {
  const fields = { model: about.model, input: $("text").value, response_format: format };
  if ($("voice").value === RECORDING) Object.assign(fields, { ref_audio: recording.used.url, ref_text: recording.used.text });
  else if ($("voice").value && $("voice").value !== "dialogue") fields.voice = $("voice").value;
  for (const [name] of SLIDERS) {
    const still = Number(Number(about.defaults[name]).toFixed(2));
    if ($(name) && Number(value(name).toFixed(2)) !== still) fields[name] = value(name);
  }
  return { fields, seed: locked() && /^\d+$/.test($("seed").value) ? $("seed").value : null };
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value: text } = await reader.read();
    if (done) return;
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

/** Samples of a WAV file that comes in pieces. */
class Samples {
  constructor() { this._rest = new Uint8Array(0); this._skip = 44; }

  take(bytes) {
    let all = new Uint8Array(this._rest.length + bytes.length);
    all.set(this._rest);
    all.set(bytes, this._rest.length);
    const skipped = Math.min(this._skip, all.length);
    this._skip -= skipped;
    all = all.slice(skipped);
    this._rest = all.slice(all.length & ~1);
    return fromInt16(new Int16Array(all.buffer, 0, all.length >> 1));
  }
}

function state(name, text) {
  document.body.dataset.state = name;
  $("status").textContent = text;
  const busy = name === "waiting" || name === "speaking";
  $("speak").hidden = busy;
  $("stop").hidden = !busy;
}

async function speak() {
  if (underWay || !about) return;
  excuse();
  if (!$("text").value.trim()) {
    fail(new Error("write a script first"));
    $("text").focus();
    return;
  }
  const control = underWay = new AbortController(), asked = request("wav"), start = performance.now();
  player.clear(player.rate);
  sound = null;
  $("figures").textContent = "";
  const focused = document.activeElement === $("speak");
  state("waiting", "Waiting for the first sound…");
  if (focused) $("stop").focus();
  let first = null, summary = null, seed = null;
  try {
    player.unlock();
    const body = { ...asked.fields, stream_format: "sse" };
    const answer = await post("v1/audio/speech", encode(body, asked.seed), control.signal);
    seed = answer.headers.get("X-Seed");
    if (!locked()) $("seed").value = seed;
    player.clear(Number(answer.headers.get("X-Sample-Rate")));
    const samples = new Samples();
    for await (const event of events(answer)) {
      if (event.type === "speech.audio.error") throw new Error(event.error.message);
      if (event.type === "speech.audio.done") summary = event;
      if (event.type !== "speech.audio.delta") continue;
      player.append(samples.take(Uint8Array.from(atob(event.audio), (letter) => letter.charCodeAt(0))));
      if (first === null) {
        first = performance.now() - start;
        state("speaking", "Speaking…");
        player.play();
      }
    }
    if (!summary) throw new Error("the server stopped in the middle");
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  }
  const back = document.activeElement === $("stop");
  underWay = null;
  player.finish();
  await ended(asked, seed, summary, first, (performance.now() - start) / 1000, control.signal.aborted);
  if (back) $("speak").focus();
}

async function ended(asked, seed, summary, first, took, stopped) {
  if (!player.length) {
    state("idle", stopped ? "Stopped." : "");
    return;
  }
  if (stopped) player.pause();
  state("done", stopped ? "Stopped." : summary ? "Done." : "Cut short.");
  const seconds = player.duration, told = [`${seconds.toFixed(1)} s of sound in ${took.toFixed(1)} s`, `first after ${(first / 1000).toFixed(2)} s`];
  if (summary?.finish_reason === "length") told.push("cut at the length limit");
  $("figures").textContent = `${told.join(" · ")} · seed ${seed}`;
  if (summary?.warnings?.length) $("warnings").replaceChildren(...summary.warnings.map((line) => make("li", { textContent: line })));
  const { ref_audio: own, ...fields } = asked.fields;
  const entry = {
    at: Date.now(), fields, seed, whole: Boolean(summary), own: own ?? null, voice: own ? "your recording" : fields.voice ?? "dialogue",
    rate: player.rate, samples: toInt16(player.samples), seconds, estimate,
  };
  take(entry);
  await history.add(entry).catch(() => {});
  await showHistory();
}

function take(entry) {
  sound = entry;
  $("download").disabled = false;
}

// The sound and its picture

function tick() {
  const width = underWay ? Math.max(player.duration, estimate) : Math.max(player.duration, 0.1);
  const at = player.position;
  waveform.draw(player, player.length || underWay ? width : 1);
  $("at").textContent = clock(at);
  $("length").textContent = clock(player.duration);
  $("play").disabled = player.length === 0;
  if ($("play").dataset.playing !== String(player.playing)) {
    $("play").dataset.playing = player.playing;
    $("play").setAttribute("aria-label", player.playing ? "Pause" : "Play");
  }
  const wave = $("wave");
  wave.setAttribute("aria-valuemax", player.duration.toFixed(1));
  wave.setAttribute("aria-valuenow", at.toFixed(1));
  wave.setAttribute("aria-valuetext", player.length ? `${at.toFixed(1)} of ${player.duration.toFixed(1)} seconds` : "no sound yet");
  requestAnimationFrame(tick);
}

function toggle() {
  if (player.playing) player.pause();
  else if (player.length) player.play();
}

function waveKey(event) {
  const at = player.position;
  const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowDown: at - 1, ArrowUp: at + 1, Home: 0, End: player.duration };
  if (event.key in moves) player.seek(moves[event.key]);
  else if (event.key === " ") toggle();
  else return;
  event.preventDefault();
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** WAV is here already; another format is spoken again with the same seed, which gives the same speech. */
async function download(entry) {
  const format = $("format").value, name = `speech-${entry.seed}.${format}`;
  if (format === "wav") return save(wav(entry.samples, entry.rate), name);
  excuse();
  $("download").disabled = true;
  try {
    const fields = { ...entry.fields, response_format: format, ...(entry.own ? { ref_audio: entry.own } : {}) };
    save(await (await post("v1/audio/speech", encode(fields, entry.seed))).blob(), name);
  } catch (error) {
    fail(error);
  }
  $("download").disabled = false;
}

// History

async function showHistory() {
  const list = await history.entries().catch(() => []);
  $("history-empty").hidden = list.length > 0;
  $("clear").hidden = list.length === 0;
  $("history").replaceChildren(...list.map(entryNode));
}

function entryNode(entry) {
  const words = entry.fields.input.replace(/\s+/g, " "), short = words.length > 90 ? `${words.slice(0, 90)}…` : words;
  const button = (text, work) => {
    const node = make("button", { type: "button", className: "quiet", textContent: text, onclick: work });
    node.setAttribute("aria-label", `${text}: ${short}`);
    return node;
  };
  const when = new Date(entry.at), told = [entry.voice, `${entry.seconds.toFixed(1)} s`, `seed ${entry.seed}`, when.toLocaleString()];
  return make("li", {},
    make("div", {}, make("p", { className: "words", textContent: short }), make("p", { className: "small", textContent: told.join(" · ") })),
    make("div", { className: "group" },
      button("Play", () => {
        if (underWay) return;
        player.load(fromInt16(entry.samples), entry.rate);
        take(entry);
        player.play();
      }),
      button("Reuse", () => reuse(entry)),
      button("Download", () => download(entry)),
      button("Delete", async () => { await history.remove(entry.id); await showHistory(); })));
}

function reuse(entry) {
  $("text").value = entry.fields.input;
  for (const [name] of SLIDERS) set(name, entry.fields[name] ?? about.defaults[name]);
  const known = [...$("voice").options].some((option) => option.value === entry.voice);
  if (known) $("voice").value = entry.voice;
  $("seed").value = entry.seed;
  lock(true);
  slid();
  voiceChosen();
  typed();
  $("text").focus();
  window.scrollTo({ top: 0 });
}

// Code for other places

let kind = "curl";

function showSnippet() {
  const { fields, seed } = request($("format").value);
  const base = new URL("v1", document.baseURI).href;
  $("snippet").textContent = snippet(kind, { base, fields, seed, key: about.key_needed });
  for (const button of document.querySelectorAll("[data-kind]")) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
  $("copied").textContent = "";
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
    $("copied").textContent = "Copied.";
  } catch { // pages without TLS have no clipboard
    getSelection().selectAllChildren($("snippet"));
    $("copied").textContent = document.execCommand("copy") ? "Copied." : "Selected: copy it yourself.";
  }
}

// The form

let typing;

function typed() {
  paint();
  remember("text", $("text").value);
  clearTimeout(typing);
  typing = setTimeout(judge, 250);
}

function restore() {
  $("text").value = recall("text") ?? Object.values(about.vocabulary.length ? DEMO : DIA)[0];
  for (const [name, number] of Object.entries(recall("values") ?? {})) set(name, number);
  const seed = recall("seed");
  if (seed) $("seed").value = seed;
  lock(Boolean(seed));
  $("format").value = recall("format") ?? (about.formats.includes("mp3") ? "mp3" : "wav");
  try { $("key").value = sessionStorage.getItem("dia-fast.key") ?? ""; } catch { /* storage is switched off */ }
  showTheme();
  paint();
}

function showTheme() { $("theme").textContent = `Theme: ${document.documentElement.dataset.theme ?? "auto"}`; }

function nextTheme() {
  const root = document.documentElement, order = [undefined, "light", "dark"];
  const next = order[(order.indexOf(root.dataset.theme) + 1) % 3];
  if (next) root.dataset.theme = next;
  else delete root.dataset.theme;
  try { next ? localStorage.setItem("dia-fast.theme", next) : localStorage.removeItem("dia-fast.theme"); } catch { /* as above */ }
  showTheme();
}

const told = (work) => (...given) => { excuse(); Promise.resolve(work(...given)).catch(fail); };

function bind() {
  $("form").addEventListener("submit", (event) => { event.preventDefault(); speak(); });
  $("stop").addEventListener("click", () => underWay?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("dialog").open) { event.preventDefault(); speak(); }
    if (event.key === "Escape" && !$("dialog").open) { underWay?.abort(); player.pause(); }
  });
  $("text").addEventListener("input", typed);
  $("text").addEventListener("scroll", () => { $("backdrop").scrollTop = $("text").scrollTop; });
  for (const bar of ["tags", "vocabulary"]) $(bar).addEventListener("click", (event) => { if (event.target.matches("button")) insert(event.target.textContent); });
  $("presets").addEventListener("change", () => { if ($("presets").value) { $("text").value = $("presets").value; typed(); } $("presets").value = ""; });
  $("voice").addEventListener("change", voiceChosen);
  $("forget").addEventListener("click", told(forgetVoice));
  $("file").addEventListener("change", async () => { const [file] = $("file").files; $("file").value = ""; if (file) await heard(file, file.name); });
  $("record").addEventListener("click", told(record));
  for (const name of ["ref-text", "voice-name", "consent"]) $(name).addEventListener("input", recordingChanged);
  $("use").addEventListener("click", told(useRecording));
  $("keep").addEventListener("click", told(keepRecording));
  $("key").addEventListener("change", told(() => { try { sessionStorage.setItem("dia-fast.key", key()); } catch { /* as above */ } return showVoices().then(judge); }));
  $("lock").addEventListener("click", () => lock(!locked()));
  $("seed").addEventListener("input", () => { $("seed").value = $("seed").value.replace(/\D/g, "").slice(0, 20); lock($("seed").value !== ""); });
  $("reset").addEventListener("click", () => { for (const [name] of SLIDERS) set(name, about.defaults[name]); slid(); });
  $("play").addEventListener("click", toggle);
  $("wave").addEventListener("keydown", waveKey);
  $("format").addEventListener("change", () => remember("format", $("format").value));
  $("download").addEventListener("click", () => download(sound));
  $("code").addEventListener("click", () => { showSnippet(); $("dialog").showModal(); });
  for (const button of document.querySelectorAll("[data-kind]")) button.addEventListener("click", () => { kind = button.dataset.kind; showSnippet(); });
  $("copy").addEventListener("click", copy);
  $("close").addEventListener("click", () => $("dialog").close());
  $("clear").addEventListener("click", told(async () => { if (confirm("Delete everything in the history?")) { await history.clear(); await showHistory(); } }));
  $("theme").addEventListener("click", nextTheme);
}

bind();
tick();
begin().catch(fail);
