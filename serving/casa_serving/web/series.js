// Numbers over the frames of a session, in bounded memory however long it runs.

const MAX_POINTS = 720;

/** A curve: neighbours are merged, keeping the larger, whenever it would have too many points. */
export class Series {
  constructor() {
    this.points = [];
    this.perPoint = 1; // Frames behind each point.
    this.waiting = []; // Frames that do not make a point yet.
  }

  push(value) {
    this.waiting.push(value);
    if (this.waiting.length < this.perPoint) return;
    this.points.push(Math.max(...this.waiting));
    this.waiting = [];
    if (this.points.length >= MAX_POINTS) this.#halve();
  }

  get max() {
    return Math.max(0, ...this.points);
  }

  #halve() {
    this.points = Array.from({ length: this.points.length / 2 }, (_, index) =>
      Math.max(this.points[2 * index], this.points[2 * index + 1]),
    );
    this.perPoint *= 2;
  }
}

/** The newest values, for percentiles. */
export class Recent {
  constructor(size = 600) {
    this.size = size;
    this.values = [];
  }

  push(value) {
    this.values.push(value);
    if (this.values.length > this.size) this.values.shift();
  }

  percentile(percent) {
    const sorted = [...this.values].sort((a, b) => a - b);
    return sorted[Math.ceil((percent / 100) * sorted.length) - 1];
  }
}

/** Returns a round number at or above a value: the top of an axis. */
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((top) => top >= value);
}
