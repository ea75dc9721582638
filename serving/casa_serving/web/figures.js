// The live figures under the video: counts of frames, and the cost of each.

import { Plot } from "./plot.js";
import { Recent } from "./series.js";

const BYTE_UNITS = ["B", "kB", "MB", "GB", "TB"];
const COUNTS = {
  sent: "sent",
  captioned: "captioned",
  silent: "silent",
  dropped: "dropped by the server",
  skipped: "not sent: browser or line too slow",
};

export class Figures {
  constructor(countList, plots) {
    this.countList = countList;
    this.plotArea = plots;
    this.clear();
  }

  clear() {
    this.counts = Object.fromEntries(Object.keys(COUNTS).map((name) => [name, 0]));
    this.delays = new Recent();
    this.droppedSinceLast = 0;
    this.insertedBytes = 0;
    this.plotArea.replaceChildren();
    const milliseconds = (value) => `${value} ms`;
    const tokens = (value) => `${value.toLocaleString("en")} tokens`;
    this.delay = new Plot(
      this.plotArea,
      "Delay per frame",
      [
        { key: "delay", label: "to the last token" },
        { key: "limit", label: "next frame" },
        { key: "dropped", label: "dropped" },
      ],
      milliseconds,
    );
    this.text = new Plot(
      this.plotArea,
      "Text in the context",
      [
        { key: "text", label: "held now" },
        { key: "budget", label: "budget" },
      ],
      tokens,
    );
    this.bytes = new Plot(
      this.plotArea,
      "KV cache",
      [
        { key: "held", label: "held now, text and image" },
        { key: "inserted", label: "images alone, if inserted into the text" },
      ],
      bytes,
    );
    this.showCounts();
  }

  count(name) {
    this.counts[name] += 1;
    if (name === "dropped") this.droppedSinceLast += 1;
    this.showCounts();
  }

  /** Adds a frame that is done; `settings` are the session's. */
  frame(event, settings) {
    this.count(event.caption.trim() ? "captioned" : "silent");
    this.#showDelay(event.delay_ms, 1000 / settings.fps);
    this.text.push(
      { text: event.text_tokens, budget: settings.text_budget },
      `${event.text_tokens} of ${settings.text_budget} tokens`,
    );
    this.insertedBytes += event.insertion_bytes;
    const saves = event.kv_bytes < this.insertedBytes; // Not with the first few frames.
    this.bytes.push(
      { held: event.kv_bytes, inserted: this.insertedBytes },
      saves ? `${bytes(event.kv_bytes)}, not ${bytes(this.insertedBytes)}` : bytes(event.kv_bytes),
    );
  }

  #showDelay(delay, limit) {
    this.delays.push(delay);
    const [median, high] = [50, 95].map((percent) => Math.round(this.delays.percentile(percent)));
    this.delay.push(
      { delay, limit, dropped: this.droppedSinceLast },
      `${Math.round(delay)} ms · p50 ${median} · p95 ${high}`,
    );
    this.droppedSinceLast = 0;
  }

  showCounts() {
    const shown = Object.entries(this.counts).filter(([name, count]) => count || name !== "skipped");
    this.countList.replaceChildren(...shown.map(([name, count]) => pair(name, COUNTS[name], count)));
  }
}

/** Returns a number of bytes in the unit that fits, with up to three digits. */
export function bytes(value) {
  const power = Math.min(Math.floor(Math.log10(Math.max(value, 1)) / 3), BYTE_UNITS.length - 1);
  return `${Number((value / 1000 ** power).toPrecision(3))} ${BYTE_UNITS[power]}`;
}

function pair(name, label, count) {
  const group = document.createElement("div");
  group.dataset.count = name;
  const [term, value] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = label;
  value.textContent = count.toLocaleString("en");
  group.append(term, value);
  return group;
}
