// Which pictures of the video are sent to the model, and when: the one that is shown, if it is due and the line is free.

import { takePicture } from "./frames.js";

// From the end of a seek until its picture is on the screen, on a busy machine too.
const MAX_PAINT_MS = 200;

export class FrameSender {
  constructor(state, screen) {
    this.state = state;
    this.screen = screen;
    this.video = screen.ui.video;
    this.canvas = document.createElement("canvas");
    this.frameTime = 0; // Of the frame that a file has shown last, or what was gone to.
    this.encoding = null; // Promise of the picture that is being encoded, or null.
    this.missed = null; // The slot that found the line busy: it has its turn for as long as it is shown.
    this.arrival = null; // Promise of the picture of a moment that is gone to, or null.
    this.arrive = null; // Settles it.
    this.isPainted = true; // The video has told of a picture since it was left for another moment.
    this.painting = null; // The timer after which it is taken for painted.
    this.video.addEventListener("emptied", () => this.#onEmptied());
    this.video.addEventListener("seeking", () => this.#onSeeking());
    this.video.addEventListener("seeked", () => this.#onSeeked());
  }

  /** The time of the picture that is shown, in the transcript. */
  get time() {
    const { source, transcript } = this.state;
    // A file that plays may be at its next frame by now. The frames of a stream count from elsewhere.
    const isExact = source?.canSeek && !this.video.paused;
    return transcript.offset + (isExact ? this.frameTime : this.video.currentTime);
  }

  /** A camera or a screen that has ended leaves something black behind. */
  get #hasPicture() {
    const { readyState, srcObject } = this.video;
    return readyState >= HTMLMediaElement.HAVE_CURRENT_DATA && (srcObject === null || srcObject.active);
  }

  /** Whether the picture that is shown may not be that of the video's time. */
  get #isUnderWay() {
    return this.video.seeking || this.arrival !== null;
  }

  /** Handles a new picture: shows its caption, and sends it if it is due. @param {number} time its own in the video */
  show(time) {
    if (!this.arrival) this.frameTime = time;
    this.screen.caption(this.time);
    this.#onPainted();
  }

  /** Sends the picture that is shown, if it is not captioned, or the session's first, as soon as the line is free. */
  look() {
    const { client, phase, slots, stopping, asking } = this.state;
    if (phase !== "live" || stopping || this.#isUnderWay || !this.#hasPicture) return;
    const slot = slots.at(this.time);
    if (this.missed !== null && this.missed !== slot && !slots.isTaken(this.missed)) this.screen.figures.count("skipped");
    this.missed = null;
    if (slots.latest && slots.isTaken(slot)) return;
    // A question is about the picture that is shown: no newer one goes before it.
    if (asking || this.encoding || client.congested) this.missed = slot;
    else this.#send(client);
  }

  /** Waits until the model has read the picture that is shown: a question would overtake a frame that waits. */
  async untilRead(client) {
    const { slots } = this.state;
    const leaves = () => new Promise((resolve) => this.video.addEventListener("seeking", resolve, { once: true }));
    while (this.#isUnderWay) await (this.arrival ?? leaves());
    await this.encoding;
    if (client !== this.state.client) return;
    if (this.#hasPicture && slots.latest?.slot !== slots.at(this.time)) await this.#send(client);
    await slots.latest?.read;
  }

  /** Ends with a session; the next one gets what this one has not captioned. */
  end() {
    this.state.slots.end();
    this.missed = null;
  }

  /** Goes on with the captions so far where the time of the video begins anew. */
  continueTime() {
    const { transcript } = this.state;
    transcript.offset = Math.max(this.time, transcript.entries.last?.timestamp ?? 0);
    this.screen.track.clear(transcript.offset);
  }

  #onEmptied() {
    this.frameTime = 0;
    this.#onPainted();
  }

  #onSeeking() {
    clearTimeout(this.painting);
    this.isPainted = false;
    this.arrival ??= new Promise((settle) => (this.arrive = settle));
  }

  /** A seek may end before its picture is painted; and that may be the same one, of which the video does not tell. */
  #onSeeked() {
    if (this.isPainted) this.#onPainted();
    else this.painting = setTimeout(() => this.#onPainted(), MAX_PAINT_MS);
  }

  #onPainted() {
    this.isPainted = true;
    if (this.arrival && !this.video.seeking) {
      this.frameTime = this.video.currentTime;
      this.arrive();
      this.arrival = null;
    }
    this.look();
  }

  async #send(client) {
    const { slots, limits } = this.state;
    const { time } = this;
    this.encoding = takePicture(this.video, this.canvas, limits);
    const picture = await this.encoding;
    this.encoding = null;
    if (!picture) return; // The browser has no memory for it.
    if (client === this.state.client) {
      slots.sent(client.sendFrame(picture, time), slots.at(time));
      this.screen.figures.count("sent");
    }
    this.look(); // Another one may be shown by now.
  }
}
