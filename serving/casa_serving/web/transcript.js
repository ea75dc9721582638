// The captions and answers of a video by time. It outlives sessions, which resume from it.

import { Timeline } from "./timeline.js";

// The server keeps what fits its text budget, and takes no more characters in one item.
const MAX_HISTORY = 400;
const MAX_CHARACTERS = 2000;

export class Transcript {
  constructor() {
    this.entries = new Timeline();
    this.captions = new Timeline(); // Those of the entries that are no questions.
    this.arrived = []; // In order of arrival, which is the model's.
    this.open = new Map(); // Key of a caption or answer that is being written -> entry.
    this.offset = 0; // The time here at which that of the video begins: a camera that is opened again begins anew.
  }

  /** Returns the caption from a time on, up to another, or null. */
  captionIn(start, end) {
    const entry = this.captions.at(end);
    return entry && entry.timestamp >= start ? entry : null;
  }

  /** Adds text to the caption of a frame; returns its entry, or null while there is nothing to show. */
  captionDelta({ frame, timestamp, text }) {
    const key = `frame ${frame}`;
    if (!this.open.has(key) && !text.trim()) return null;
    const entry = this.open.get(key) ?? this.#add(key, { kind: "caption", timestamp, text: "", done: false });
    entry.text += text;
    return entry;
  }

  /** Ends the caption of a frame; returns its entry, or null if the frame was silent. */
  captionDone({ frame, timestamp, caption }) {
    if (!caption.trim()) return this.#drop(`frame ${frame}`);
    this.captionDelta({ frame, timestamp, text: caption });
    return this.#finish(`frame ${frame}`, caption);
  }

  /** Adds a question; its answer is written into the entry that is returned. */
  question(id, timestamp, question) {
    return this.#add(`question ${id}`, { kind: "question", timestamp, question, text: "", done: false });
  }

  answerDelta({ id, text }) {
    const entry = this.open.get(`question ${id}`);
    if (entry) entry.text += text;
    return entry ?? null;
  }

  answerDone({ id, text }) {
    return this.#finish(`question ${id}`, text);
  }

  /** Drops unfinished entries of one kind, or all; returns them. */
  dropUnfinished(kind = null) {
    const gone = [...this.open].filter(([, entry]) => kind === null || entry.kind === kind);
    for (const [key] of gone) this.#drop(key);
    return gone.map(([, entry]) => entry);
  }

  /** Returns the history for session.create. */
  history() {
    const finished = this.arrived.filter((entry) => entry.done).slice(-MAX_HISTORY);
    return finished.map(({ kind, timestamp, question, text }) => {
      const kept = text.slice(0, MAX_CHARACTERS);
      return kind === "caption" ? { caption: kept, timestamp } : { question, answer: kept };
    });
  }

  #add(key, entry) {
    this.entries.add(entry);
    if (entry.kind === "caption") this.captions.add(entry);
    this.arrived.push(entry);
    this.open.set(key, entry);
    return entry;
  }

  #finish(key, text) {
    const entry = this.open.get(key);
    if (!entry) return null;
    Object.assign(entry, { text, done: true });
    this.open.delete(key);
    return entry;
  }

  #drop(key) {
    const entry = this.open.get(key);
    if (!entry) return null;
    this.open.delete(key);
    this.entries.remove(entry);
    if (entry.kind === "caption") this.captions.remove(entry);
    this.arrived.splice(this.arrived.lastIndexOf(entry), 1);
    return null;
  }
}
