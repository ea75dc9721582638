// What is on the screen besides the video: status, problems, captions, figures, and which buttons there are.

import { CaptionTrack } from "./caption_track.js";
import { Figures } from "./figures.js";
import { hasSmallWindow } from "./placement.js";
import { canShareScreen } from "./sources.js";
import { TranscriptView } from "./transcript_view.js";

const NOTICE_MS = 8000;

export class Screen {
  /** @param {(time: number) => void} onSeek is called when a caption is chosen */
  constructor(document, onSeek) {
    this.document = document;
    this.root = document.documentElement;
    this.ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));
    this.figures = new Figures(this.ui.counts, this.ui.plots);
    this.view = new TranscriptView(this.ui.captions, this.ui["captions-scroll"], this.ui["captions-empty"], onSeek);
    this.track = new CaptionTrack(this.ui.video);
    this.notice = null; // Timer that hides a problem.
    this.mayAsk = false; // A question is sent at once.
    for (const button of document.querySelectorAll("[data-action=screen]")) button.hidden = !canShareScreen();
  }

  /** Shows a phase with its status text and its buttons. */
  show(state, status, kind = "idle") {
    const { ui } = this;
    const { phase, source, needsKey } = state;
    const focused = this.document.activeElement;
    const hasVideo = source !== null && source.kind !== "image";
    this.root.dataset.phase = phase;
    ui.status.textContent = status;
    ui.status.dataset.kind = kind;
    const visible = {
      stop: ["opening", "connecting", "live", "waiting"].includes(phase),
      // Where a key is asked for, nothing goes on without it.
      reconnect: hasVideo && !needsKey && (phase === "stopped" || phase === "waiting"),
      restart: hasVideo && !needsKey && (phase === "live" || phase === "stopped"),
      "full-screen": hasVideo,
      "small-window": hasVideo && hasSmallWindow(ui.video),
      video: source?.kind !== "image",
      still: source?.kind === "image",
      "key-form": needsKey,
    };
    for (const [name, shown] of Object.entries(visible)) ui[name].hidden = !shown;
    ui.reconnect.textContent = phase === "waiting" ? "Try now" : "Reconnect";
    ui.stage.toggleAttribute("data-empty", source === null);
    ui["source-name"].textContent = source?.name ?? "";
    this.showSaving(state.transcript);
    if (source?.kind !== "camera") ui["camera-choice"].hidden = true;
    this.allowQuestion(phase === "live" || phase === "image");
    if (focused && focused !== this.document.body && !isSeen(focused)) this.#keepFocus(focused);
  }

  /** Gives the focus of what is gone to the button that took its place, else to the picture. */
  #keepFocus(gone) {
    const { stop, reconnect, stage } = this.ui;
    const successor = gone.parentElement === stop.parentElement && [stop, reconnect].find(isSeen);
    (successor || stage).focus();
  }

  /** Lets questions be sent or not. They can be typed at any time, and a button that waits keeps the focus. */
  allowQuestion(allowed) {
    this.mayAsk = allowed;
    for (const button of [this.ui.ask, ...this.ui.suggestions.children]) button.ariaDisabled = String(!allowed);
    this.questionHint("");
  }

  /** Shows why a question is not sent, or nothing with "". */
  questionHint(text) {
    this.ui["question-hint"].textContent = text;
  }

  showSaving(transcript) {
    this.ui["save-srt"].hidden = this.ui["save-vtt"].hidden = transcript.captions.last === null;
  }

  /** Offers the cameras, if there is a choice. @param {{id: string, name: string}[]} cameras @param {string} now its id */
  offerCameras(cameras, now) {
    const { ui } = this;
    ui.cameras.replaceChildren(...cameras.map(({ id, name }) => new Option(name, id, false, id === now)));
    ui["camera-choice"].hidden = cameras.length < 2;
  }

  /** Shows an error message, or hides it with "". */
  problem(message) {
    clearTimeout(this.notice);
    const { problem } = this.ui;
    if (problem.textContent !== message) problem.textContent = message; // Read out once, also when tried often.
    problem.hidden = !message;
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
    if (entry.kind === "caption") this.track.show(entry, transcript.captions);
    // Read out whole, not word by word.
    if (entry.done) this.ui.spoken.textContent = entry.text;
    this.showSaving(transcript);
    this.caption(transcript);
  }

  /** Takes an entry away that was not finished. */
  remove(entry, transcript) {
    this.view.remove(entry);
    this.track.remove(entry, transcript.captions);
  }

  /** Shows the caption that belongs to a time in the video. */
  caption(transcript, time = this.ui.video.currentTime) {
    const entry = transcript.captions.at(time);
    const text = entry?.text.trim() ?? "";
    if (this.ui.caption.textContent !== text) this.ui.caption.textContent = text;
    this.view.mark(entry);
  }

  /** Clears everything about a video. */
  clear() {
    this.view.clear();
    this.track.clear();
    this.figures.clear();
    this.ui.caption.textContent = this.ui.spoken.textContent = "";
  }
}

function isSeen(element) {
  return element.getClientRects().length > 0;
}
