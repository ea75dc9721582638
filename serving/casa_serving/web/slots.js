// The turns of a session's frames, and what became of them: a turn, or slot, is 1/fps of the video's time.

const SLACK = 1e-3; // Of a slot: times are rounded on their way through a browser.

/**
 * @typedef {{number: number, slot: number, read: Promise<void>}} SentFrame `number`: the server's; `read` is settled
 *   when the model has read it, or a newer one in its place
 */

export class Slots {
  constructor() {
    this.fps = null;
    this.captioned = new Set(); // Those whose frame was read, by whichever session: they are not asked for again.
    this.end();
  }

  /** Begins with a session, whose model has not read anything yet. */
  begin(fps) {
    this.end();
    if (fps !== this.fps) this.captioned.clear();
    this.fps = fps;
  }

  /** Ends with a session; what it has not answered gets another chance. */
  end() {
    this.waiting = new Map(); // Number of a frame that the server owes a word about -> SentFrame and its `settle`.
    this.latest = null; // The SentFrame that the model has, or is going to have; null before the session's first.
  }

  /** Returns the slot of a time. */
  at(time) {
    return Math.floor(time * this.fps + SLACK);
  }

  /** Returns where a slot begins and ends. */
  span(slot) {
    return [(slot - SLACK) / this.fps, (slot + 1 - SLACK) / this.fps];
  }

  /** Whether a slot is captioned, or is going to be. */
  isTaken(slot) {
    return this.captioned.has(slot) || [...this.waiting.values()].some((frame) => frame.slot === slot);
  }

  sent(number, slot) {
    const frame = { number, slot };
    frame.read = new Promise((settle) => this.waiting.set(number, Object.assign(frame, { settle })));
    this.latest = frame;
  }

  /** A frame was read, or rejected: another try would be, too. */
  done(number) {
    const frame = this.waiting.get(number);
    this.waiting.delete(number);
    this.captioned.add(frame.slot);
    frame.settle();
  }

  /** A newer frame took a frame's place; its slot gets another chance when it is played again. */
  dropped(number, replacedBy) {
    const frame = this.waiting.get(number);
    this.waiting.delete(number);
    frame.settle(this.waiting.get(replacedBy)?.read);
  }
}
