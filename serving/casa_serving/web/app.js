// The page's controls and what they do.

import { closeSource, openCamera, openFile, watchFrames } from "./frames.js";
import { Screen } from "./screen.js";
import { Session } from "./session.js";
import { boundFields } from "./settings.js";
import { createState } from "./state.js";
import { Transcript } from "./transcript.js";
import { SourceError } from "./messages.js";

class App {
  constructor(document) {
    this.document = document;
    this.state = createState();
    this.screen = new Screen(document, (time) => this.seek(time));
    this.session = new Session(this.state, this.screen);
    this.video = this.screen.ui.video;
  }

  start() {
    const { ui } = this.screen;
    this.onClick("[data-action=choose]", () => ui.file.click());
    this.onClick("[data-action=camera]", () => this.useCamera());
    this.onClick("#stop", () => this.stop());
    this.onClick("#reconnect", () => this.session.connect(true));
    this.onClick("#restart", () => this.restart());
    this.onSubmit("#settings", () => this.applySettings());
    this.onSubmit("#question-form", () => this.ask());
    this.onSubmit("#key-form", () => this.useKey());
    ui.file.addEventListener("change", () => this.useFile(ui.file.files[0]));
    this.acceptDrops(ui.stage);
    watchFrames(this.video, (time) => this.session.onVideoFrame(time));
    this.video.addEventListener("timeupdate", () => this.screen.caption(this.state.transcript));
    this.screen.show(this.state, "Pick a video to begin");
    boundFields(this.document);
  }

  onClick(selector, action) {
    for (const button of this.document.querySelectorAll(selector)) button.addEventListener("click", action);
  }

  onSubmit(selector, action) {
    this.document.querySelector(selector).addEventListener("submit", (event) => {
      event.preventDefault();
      action();
    });
  }

  acceptDrops(stage) {
    const highlight = (event, on) => {
      event.preventDefault();
      stage.toggleAttribute("data-drop", on);
    };
    stage.addEventListener("dragover", (event) => highlight(event, true));
    stage.addEventListener("dragleave", (event) => highlight(event, false));
    stage.addEventListener("drop", (event) => {
      highlight(event, false);
      this.useFile(event.dataTransfer.files[0]);
    });
  }

  useFile(file) {
    if (!file) return;
    this.useSource({ name: file.name, isCamera: false }, () => openFile(file));
    this.screen.ui.file.value = ""; // So that the same file may be chosen again.
  }

  useCamera() {
    this.useSource({ name: "Camera", isCamera: true }, openCamera);
  }

  /** Shows another video, if it can be opened; what is shown now goes on until then. */
  async useSource(source, open) {
    let show;
    try {
      show = await open();
    } catch (error) {
      if (!(error instanceof SourceError)) throw error;
      this.screen.temporaryProblem(error.message);
      return;
    }
    this.session.abandon();
    this.reset();
    closeSource(this.video);
    await show(this.video);
    this.state.source = source;
    this.session.connect(true);
  }

  /** Clears the transcript and the screen, for another video or for this one from its beginning. */
  reset() {
    this.state.transcript = new Transcript();
    this.state.seen.clear();
    this.screen.clear();
  }

  stop() {
    this.video.pause();
    this.state.client.stop();
    if (!this.state.source?.isCamera) return;
    closeSource(this.video); // The camera is off; its captions stay.
    this.state.source = null;
  }

  restart() {
    this.session.abandon();
    this.reset();
    if (!this.state.source.isCamera) this.video.currentTime = 0;
    this.session.connect(true);
  }

  applySettings() {
    if (this.state.source) this.session.connect(!this.video.paused);
  }

  useKey() {
    this.state.key = this.screen.ui.key.value;
    this.session.connect(true);
  }

  ask() {
    const { question } = this.screen.ui;
    const text = question.value.trim();
    if (!text || this.state.phase !== "live") return;
    question.value = "";
    this.session.ask(text);
  }

  seek(time) {
    if (this.state.source && !this.state.source.isCamera) this.video.currentTime = time;
  }
}

new App(document).start();
