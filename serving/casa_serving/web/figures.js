// The live figures under the video: counts of frames, and the cost of each.

import { Plot } from "./plot.js";
import { Recent } from "./series.js";

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
    this.pagesIfKept = 0;
    this.plotArea.replaceChildren();
    this.delay = new Plot(this.plotArea, "Delay per frame", [
      { key: "delay", label: "to the last token" },
      { key: "limit", label: "next frame" },
      { key: "dropped", label: "dropped" },
    ]);
    this.text = new Plot(this.plotArea, "Text tokens", [
      { key: "text", label: "in the context" },
      { key: "budget", label: "budget" },
    ]);
    this.pages = new Plot(this.plotArea, "Image pages", [
      { key: "pages", label: "held now" },
      { key: "kept", label: "if all frames stayed" },
    ]);
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
      `${event.text_tokens} of ${settings.text_budget}`,
    );
    this.pagesIfKept += event.image_pages;
    this.pages.push({ pages: event.image_pages, kept: this.pagesIfKept }, `${event.image_pages}, not ${this.pagesIfKept}`);
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

function pair(name, label, count) {
  const group = document.createElement("div");
  group.dataset.count = name;
  const [term, value] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = label;
  value.textContent = count.toLocaleString("en");
  group.append(value, term);
  return group;
}
