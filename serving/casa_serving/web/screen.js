// What is on the screen besides the video: status, problems, captions, figures, and which buttons there are.

import { CaptionTrack } from "./caption_track.js";
import { Figures } from "./figures.js";
import { listHint, unansweredHint } from "./messages.js";
import { hasSmallWindow } from "./placement.js";
import { canShareScreen } from "./sources.js";
import { TranscriptView, said } from "./transcript_view.js";

const NOTICE_MS = 8000;
const OPENING = "Opening…";

export class Screen {
  /** @param {(time: number) => void} onSeek is called when a caption is chosen */
  constructor(document, onSeek) {
    this.document = document;
    this.root = document.documentElement;
    this.ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((node) => [node.id, node]));
    this.figures = new Figures(this.ui.counts, this.ui.plots);
    this.view = new TranscriptView(this.ui.captions, this.ui["captions-scroll"], this.ui["captions-empty"], onSeek);
    this.track = new CaptionTrack(this.ui.video);
    this.transcript = null; // What the captions and answers on the screen are of.
    this.status = { text: "", kind: "idle" };
    this.openings = 0; // How many sources are being opened.
    this.lasting = ""; // The problem that stays until it is mended.
    this.notice = null; // Timer that ends another one, which is shown for a while.
    this.mayAsk = false; // A question is sent at once.
    this.unanswered = ""; // Hint about a question that was given back.
    this.applies = this.ui["apply-hint"].textContent; // What Apply does.
    for (const button of document.querySelectorAll("[data-action=screen]")) button.hidden = !canShareScreen();
  }

  /** Shows a phase with its status text and its buttons. */
  show(state, status, kind = "idle") {
    const { ui } = this;
    const { phase, source, needsKey } = state;
    const focused = this.document.activeElement;
    const hasVideo = Boolean(source?.hasVideo);
    this.root.dataset.phase = phase;
    this.status = { text: status, kind };
    this.#showStatus(this.status);
    const visible = {
      // A camera or a screen is let go by it, whatever became of the session.
      stop: ["opening", "connecting", "live", "waiting"].includes(phase) || (phase === "stopped" && source?.isStream),
      // Where a key is asked for, nothing goes on without it.
      reconnect: hasVideo && !needsKey && (phase === "stopped" || phase === "waiting"),
      restart: hasVideo && !needsKey && (phase === "live" || phase === "stopped"),
      "full-screen": hasVideo,
      "small-window": hasVideo && hasSmallWindow(ui.video),
      video: source === null || hasVideo,
      still: source !== null && !hasVideo,
      "key-form": needsKey,
    };
    for (const [name, shown] of Object.entries(visible)) ui[name].hidden = !shown;
    ui.reconnect.textContent = phase === "waiting" ? "Try now" : "Reconnect";
    ui.stage.toggleAttribute("data-empty", source === null);
    ui["source-name"].textContent = source?.name ?? "";
    this.applyHint(this.applies);
    this.#showSaving();
    if (source?.kind !== "camera") ui["camera-choice"].hidden = true;
    this.allowQuestion(phase === "live" || phase === "image");
    if (focused && focused !== this.document.body && !isSeen(focused)) this.#keepFocus(focused);
  }

  #showStatus({ text, kind }) {
    this.ui.status.textContent = text;
    this.ui.status.dataset.kind = kind;
  }

  /** Says that something is being opened until the promise of it is settled; what is shown now goes on meanwhile. */
  async whileOpening(promise) {
    this.openings += 1;
    this.#showStatus({ text: OPENING, kind: "busy" });
    try {
      return await promise;
    } finally {
      this.openings -= 1;
      if (this.openings === 0) this.#showStatus(this.status);
    }
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

  /** Shows why a question is not sent; "": nothing, or what became of the last one. */
  questionHint(text) {
    this.ui["question-hint"].textContent = text || this.unanswered;
  }

  /** Takes a question that got no answer back to where it was typed, unless another one is being typed there. */
  giveBack(question) {
    this.unanswered = unansweredHint(question);
    this.ui.question.value ||= question;
    this.questionHint("");
  }

  /** A question was asked: the one before is history. */
  asked() {
    this.unanswered = "";
    this.questionHint("");
  }

  applyHint(text) {
    this.ui["apply-hint"].textContent = text;
  }

  #showSaving() {
    this.ui["save-srt"].hidden = this.ui["save-vtt"].hidden = !this.transcript?.captions.last;
  }

  /** Offers the cameras, if there is a choice. @param {{id: string, name: string}[]} cameras @param {string} now its id */
  offerCameras(cameras, now) {
    const { ui } = this;
    ui.cameras.replaceChildren(...cameras.map(({ id, name }) => new Option(name, id, false, id === now)));
    ui["camera-choice"].hidden = cameras.length < 2;
  }

  /** Shows an error message until it is mended, or hides it with "". */
  problem(message) {
    this.lasting = message;
    this.#showProblem(message);
  }

  #showProblem(message) {
    clearTimeout(this.notice);
    const { problem } = this.ui;
    if (problem.textContent !== message) problem.textContent = message; // Read out once, also when tried often.
    problem.hidden = !message;
  }

  /** Shows an error message for a while: then what was shown before, or nothing if the session goes on. */
  temporaryProblem(message) {
    this.#showProblem(message);
    this.notice = setTimeout(() => {
      if (this.lasting || this.root.dataset.phase === "live") this.#showProblem(this.lasting);
    }, NOTICE_MS);
  }

  /** Begins with another transcript, of a source that is shown from now on or null. */
  begin(transcript, source) {
    this.transcript = transcript;
    this.view.clear({ hint: listHint(source), canChoose: !source || source.canSeek });
    this.track.clear(transcript.offset);
    this.figures.clear();
    this.ui.caption.textContent = this.ui.spoken.textContent = "";
    this.asked();
  }

  /** Shows an entry of the transcript as it is now; null is nothing. */
  entry(entry) {
    if (!entry) return;
    const { captions, entries } = this.transcript;
    this.view.show(entry, entries);
    if (entry.kind === "caption") this.track.show(entry, captions);
    // Read out whole, not word by word.
    if (entry.done) this.ui.spoken.textContent = said(entry);
    this.#showSaving();
    this.caption();
  }

  /** Takes an entry away that was not finished. */
  remove(entry) {
    this.view.remove(entry, this.transcript.entries);
    this.track.remove(entry, this.transcript.captions);
  }

  /** Shows the caption that belongs to a time in the transcript. */
  caption(time = this.transcript.offset + this.ui.video.currentTime) {
    const entry = this.transcript.captions.at(time);
    const text = entry?.text.trim() ?? "";
    if (this.ui.caption.textContent !== text) this.ui.caption.textContent = text;
    this.view.mark(entry);
  }
}

function isSeen(element) {
  return element.getClientRects().length > 0;
}
