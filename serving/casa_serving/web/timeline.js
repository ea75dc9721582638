// Entries by their time in the video. However many there are, one is found in a handful of steps.

export class Timeline {
  constructor() {
    this.items = [];
  }

  get last() {
    return this.items.at(-1) ?? null;
  }

  /** Adds an entry, behind those of the same time. */
  add(entry) {
    this.items.splice(this.#countUpTo(entry.timestamp), 0, entry);
  }

  remove(entry) {
    const index = this.#indexOf(entry);
    if (index >= 0) this.items.splice(index, 1);
  }

  /** Returns the newest entry up to and including a time, or null. */
  at(time) {
    return this.items[this.#countUpTo(time) - 1] ?? null;
  }

  before(entry) {
    return this.items[this.#indexOf(entry) - 1] ?? null;
  }

  after(entry) {
    return this.items[this.#indexOf(entry) + 1] ?? null;
  }

  /** Returns the number of entries up to and including a time, by binary search. */
  #countUpTo(time) {
    let low = 0;
    let high = this.items.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.items[middle].timestamp <= time) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  #indexOf(entry) {
    // Among those of the same time, the one that is being written is the last.
    let index = this.#countUpTo(entry.timestamp) - 1;
    while (index >= 0 && this.items[index] !== entry) index -= 1;
    return index;
  }
}
