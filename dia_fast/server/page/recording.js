/** Sound as WAV, made in the browser: of samples, of files in any format the browser reads, of the microphone. */

export function toInt16(samples) {
  return Int16Array.from(samples, (value) => Math.round(Math.max(-1, Math.min(1, value)) * 32767));
}

export function fromInt16(samples) {
  return Float32Array.from(samples, (value) => value / 32768);
}

/** A WAV file of 16-bit mono samples. */
export function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44));
  const put = (at, text) => [...text].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  put(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  put(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  put(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  return new Blob([view, samples], { type: "audio/wav" });
}

/** Decodes a file to mono. Throws an Error that says so if the browser cannot. */
export async function decode(blob) {
  const context = new OfflineAudioContext(1, 1, 44100);
  let sound;
  try {
    sound = await context.decodeAudioData(await blob.arrayBuffer());
  } catch {
    throw new Error("the browser cannot read this file; try wav, mp3, ogg or flac");
  }
  const mono = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++)
    sound.getChannelData(channel).forEach((value, i) => { mono[i] += value / sound.numberOfChannels; });
  return { samples: toInt16(mono), rate: sound.sampleRate, seconds: sound.duration };
}

/** Starts the microphone. `heard(seconds)` is told how long it has heard; the result's `stop()` gives that, as a Blob. */
export async function microphone(heard) {
  if (!navigator.mediaDevices) throw new Error("browsers record on https pages and on localhost only");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: false, noiseSuppression: false } });
  } catch (error) {
    throw new Error(error.name === "NotAllowedError" ? "the microphone was not allowed" : "there is no microphone");
  }
  const recorder = new MediaRecorder(stream), parts = [];
  let first = null;  // a microphone can take seconds to give its first sound
  recorder.ondataavailable = (event) => {
    parts.push(event.data);
    if (event.data.size) first ??= performance.now();
    if (first !== null && recorder.state === "recording") heard((performance.now() - first) / 1000);
  };
  recorder.start(200);
  return {
    stop: () => new Promise((resolve) => {
      recorder.onstop = () => {
        stream.getTracks().forEach((track) => track.stop());
        resolve(new Blob(parts, { type: recorder.mimeType }));
      };
      recorder.stop();
    }),
  };
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
