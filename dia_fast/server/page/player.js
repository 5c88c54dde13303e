/**
 * Plays sound that is still arriving. Chunks are scheduled one behind the other on the clock of an AudioContext:
 * unlike an AudioWorklet that works on pages without TLS too.
 */
const FIRST_LEAD = 0.15; // seconds of sound before the first start; doubled whenever the sound runs dry
const LONGEST_LEAD = 3;
export const PEAKS_PER_SECOND = 100;

export class Player {
  constructor() {
    this._context = null;
    this.sound = 0; // counts them
    this.clear(24000);
  }

  /** Forget the sound; what comes next has this rate. */
  clear(rate) {
    this._silence();
    this.sound++;
    this.rate = rate;
    this.length = 0; // samples
    this._samples = new Float32Array(rate * 8);
    this.peaks = [];
    this.complete = false;
    this.playing = false;
    this._at = 0;
    this._lead = FIRST_LEAD;
    if (this._context && this._context.sampleRate !== rate) {
      this._context.close();
      this._context = null;
    }
  }

  /** In a click: browsers start sound in no other place. */
  unlock() {
    this._context ??= new AudioContext({ sampleRate: this.rate });
    return this._context.resume();
  }

  load(samples, rate) {
    this.clear(rate);
    this.append(samples);
    this.finish();
  }

  append(samples) {
    if (this.length + samples.length > this._samples.length) {
      const larger = new Float32Array(Math.max(2 * this._samples.length, this.length + samples.length));
      larger.set(this._samples.subarray(0, this.length));
      this._samples = larger;
    }
    this._samples.set(samples, this.length);
    this.length += samples.length;
    this._measure();
    if (this.playing) this._schedule();
  }

  /** Nothing more will come. */
  finish() {
    this.complete = true;
    this._measure();
    if (this.playing) this._schedule();
  }

  get duration() { return this.length / this.rate; }

  get samples() { return this._samples.subarray(0, this.length); }

  get position() {
    if (!this.playing || !this._context) return this._at;
    const now = this._context.currentTime;
    for (const part of this._parts) {
      if (part.when > now) break;
      this._at = Math.max(this._at, Math.min(part.from + now - part.when, part.to));
    }
    if (this.complete && this._at >= this.duration - 1e-3) {
      this.playing = false;
      this._silence();
    }
    return this._at;
  }

  play() {
    if (this.complete && this.position >= this.duration - 0.01) this._at = 0;
    this.unlock();
    this.playing = true;
    this._next = Math.round(this._at * this.rate);
    this._when = 0;
    this._schedule();
  }

  pause() {
    const at = this.position;
    this.playing = false;
    this._silence();
    this._at = at;
  }

  seek(seconds) {
    const playing = this.playing;
    this._silence();
    this.playing = false;
    this._at = Math.max(0, Math.min(seconds, this.duration));
    if (playing && !(this.complete && this._at === this.duration)) this.play();
  }

  _silence() {
    for (const part of this._parts ?? []) part.source.stop();
    this._parts = [];
    this._next = 0; // the first sample that is not scheduled
    this._when = 0; // until when sound is scheduled
  }

  _schedule() {
    const count = this.length - this._next, now = this._context.currentTime;
    if (count <= 0) return;
    if (this._when < now) {
      const dry = this._when > 0;
      if (dry) {
        this._lead = Math.min(2 * this._lead, LONGEST_LEAD);
        this._when = 0;
      }
      if (!this.complete && count < this._lead * this.rate) return;
      this._when = now + 0.02;
    }
    const buffer = this._context.createBuffer(1, count, this.rate);
    buffer.copyToChannel(this._samples.subarray(this._next, this.length), 0);
    const source = this._context.createBufferSource();
    source.buffer = buffer;
    source.connect(this._context.destination);
    source.start(this._when);
    const from = this._next / this.rate;
    this._parts.push({ source, when: this._when, from, to: from + buffer.duration });
    this._when += buffer.duration;
    this._next = this.length;
  }

  _measure() {
    const size = Math.round(this.rate / PEAKS_PER_SECOND);
    const complete = this.complete ? Math.ceil(this.length / size) : Math.floor(this.length / size);
    while (this.peaks.length < complete) {
      const start = this.peaks.length * size;
      let peak = 0;
      for (let i = start; i < Math.min(start + size, this.length); i++) peak = Math.max(peak, Math.abs(this._samples[i]));
      this.peaks.push(peak);
    }
  }
}
