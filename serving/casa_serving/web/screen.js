// What is on the screen besides the video: status, problems, captions, figures, and which buttons there are.

import { Figures } from "./figures.js";
import { TranscriptView } from "./transcript_view.js";

const NOTICE_MS = 8000;

export class Screen {
  /** @param {(time: number) => void} onSeek is called when a caption is chosen */
  constructor(document, onSeek) {
    this.root = document.documentElement;
    this.ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));
    this.figures = new Figures(this.ui.counts, this.ui.plots);
    this.view = new TranscriptView(this.ui.captions, this.ui["captions-scroll"], this.ui["captions-empty"], onSeek);
    this.notice = null; // Timer that hides a problem.
  }

  /** Shows a phase with its status text and its buttons. */
  show(state, status, kind = "idle") {
    const { ui } = this;
    const { phase, source } = state;
    this.root.dataset.phase = phase;
    ui.status.textContent = status;
    ui.status.dataset.kind = kind;
    const visible = {
      choose: source !== null,
      camera: source !== null,
      stop: phase === "live",
      reconnect: phase === "stopped",
      restart: phase === "live" || phase === "stopped",
    };
    for (const [name, shown] of Object.entries(visible)) ui[name].hidden = !shown;
    ui.stage.toggleAttribute("data-empty", source === null);
    ui["source-name"].textContent = source?.name ?? "";
    ui.question.disabled = ui.ask.disabled = phase !== "live";
  }

  /** Enables sending: while an answer is awaited the next question may be typed, not sent. */
  allowQuestion(allowed) {
    this.ui.ask.disabled = !allowed;
  }

  /** Shows an error message, or hides it with "". */
  problem(message) {
    clearTimeout(this.notice);
    this.ui.problem.textContent = message;
    this.ui.problem.hidden = !message;
  }

  /** Shows an error message for a while: the session goes on. */
  temporaryProblem(message) {
    this.problem(message);
    this.notice = setTimeout(() => this.problem(""), NOTICE_MS);
  }

  /** Shows an entry of the transcript as it is now; null is nothing. */
  entry(entry, transcript) {
    if (!entry) return;
    this.view.show(entry, transcript.entries);
    this.caption(transcript);
  }

  /** Shows the caption that belongs to a time in the video. */
  caption(transcript, time = this.ui.video.currentTime) {
    const entry = transcript.captionAt(time);
    const text = entry?.text.trim() ?? "";
    if (this.ui.overlay.textContent !== text) this.ui.overlay.textContent = text;
    this.ui.overlay.hidden = !text;
    this.view.mark(entry);
  }

  /** Clears everything about a video. */
  clear() {
    this.view.clear();
    this.figures.clear();
    this.ui.overlay.hidden = true;
  }
}
