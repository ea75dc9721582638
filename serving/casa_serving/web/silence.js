// Noticing that the other side has fallen silent: a connection may be lost without a word, as after a pulled cable.

/** Calls `onSilence` when nothing was heard for a while although something was expected. */
export class SilenceTimer {
  constructor(limitMs, onSilence) {
    Object.assign(this, { limitMs, onSilence, timer: null });
  }

  /** Something was sent that the other side answers. What it owes already has its time from before. */
  expect() {
    this.timer ??= setTimeout(() => {
      this.heard();
      this.onSilence();
    }, this.limitMs);
  }

  /** Something came, or nothing is expected any more. */
  heard() {
    clearTimeout(this.timer);
    this.timer = null;
  }
}

/** Returns what `read` makes of the response of a request, or null if that is not there in time. */
export async function fetchWithin(limitMs, url, options = {}, read = (response) => response) {
  const aborter = new AbortController();
  const timer = setTimeout(() => aborter.abort(), limitMs);
  const result = await fetch(url, { ...options, signal: aborter.signal }).then(read).catch(() => null);
  clearTimeout(timer);
  return result;
}
