// Waiting between tries, longer and longer, so that a server that comes back is not met by everybody at once.

const WAITS_MS = [500, 1000, 2000, 4000, 8000, 15000, 30000];

export class Backoff {
  constructor() {
    this.tries = 0;
    this.timer = null;
    this.action = null;
    this.onOnline = () => this.hurry(); // A network that is back is worth a try at once.
  }

  /** Calls `action` after a while: half of the next wait, and up to as much again by chance. */
  schedule(action) {
    this.cancel();
    const longest = WAITS_MS[Math.min(this.tries, WAITS_MS.length - 1)];
    this.tries += 1;
    this.action = action;
    addEventListener("online", this.onOnline);
    this.timer = setTimeout(() => this.hurry(), longest * (0.5 + Math.random() / 2));
  }

  /** Calls what is scheduled now. */
  hurry() {
    const { action } = this;
    this.cancel();
    action?.();
  }

  cancel() {
    clearTimeout(this.timer);
    removeEventListener("online", this.onOnline);
    this.action = null;
  }

  /** Begins with the shortest wait again: something has worked. */
  reset() {
    this.tries = 0;
  }
}
