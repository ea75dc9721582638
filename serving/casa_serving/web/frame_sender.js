// Which pictures of the video are sent to the model, and when: the one that is shown, if it is due and the line is free.

import { takePicture } from "./frames.js";

export class FrameSender {
  constructor(state, screen) {
    this.state = state;
    this.screen = screen;
    this.video = screen.ui.video;
    this.canvas = document.createElement("canvas");
    this.frameTime = 0; // Of the frame that a file has shown last, while it plays.
    this.encoding = null; // Promise of the picture that is being encoded, or null.
    this.missed = null; // The slot that found the line busy: it has its turn for as long as it is shown.
    this.video.addEventListener("emptied", () => (this.frameTime = 0));
    // Another moment may have the same picture, of which the video does not tell.
    this.video.addEventListener("seeked", () => {
      this.frameTime = this.video.currentTime;
      this.look();
    });
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

  /** Handles a new picture: shows its caption, and sends it if it is due. @param {number} time its own in the video */
  show(time) {
    this.frameTime = time;
    this.screen.caption(this.time);
    this.look();
  }

  /** Sends the picture that is shown, if it is not captioned, or the session's first, as soon as the line is free. */
  look() {
    const { client, phase, slots, stopping, asking } = this.state;
    if (phase !== "live" || stopping || this.video.seeking || !this.#hasPicture) return;
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
    while (this.video.seeking) await new Promise((resolve) => this.video.addEventListener("seeked", resolve, { once: true }));
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
