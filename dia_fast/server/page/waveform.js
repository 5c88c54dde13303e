import WaveSurfer from "./wavesurfer-8.0.1.esm.js";
import { PEAKS_PER_SECOND } from "./player.js";

/** The picture of a player's sound. wavesurfer.js draws it and tells where it is clicked; the sound is the player's. */
export class Waveform {
  /** `seek` takes the seconds of a click. `nonce` is the policy's for the styles that the library brings. */
  constructor(container, nonce, seek) {
    this._container = container;
    this._shown = "";
    this._surfer = WaveSurfer.create({
      container, cspNonce: nonce, peaks: [[0, 0]], duration: 1, height: "auto", hideScrollbar: true, dragToSeek: true,
      barWidth: 2.5, barGap: 1.5, barRadius: 1.25, barMinHeight: 2, cursorWidth: 0,
    });
    this._surfer.on("interaction", seek);
  }

  /** `seconds` is how wide the picture is: the sound that is expected, while it arrives. */
  draw(player, seconds) {
    const style = getComputedStyle(this._container);
    const waveColor = style.getPropertyValue("--wave"), progressColor = style.getPropertyValue("--accent");
    if (waveColor !== this._color) this._surfer.setOptions({ waveColor, progressColor });
    this._color = waveColor;
    const shown = [player.sound, player.peaks.length, seconds].join();
    if (shown === this._shown) return this._surfer.setTime(Math.min(player.position, seconds));
    this._shown = shown;
    const peaks = new Float32Array(Math.max(2, Math.ceil(seconds * PEAKS_PER_SECOND), player.peaks.length));
    player.peaks.forEach((peak, at) => { peaks[at] = Math.sqrt(peak) * 0.94; }); // soft speech is seen too
    this._surfer.load("", [peaks], seconds).catch(() => {}); // a later one took its place
  }
}
