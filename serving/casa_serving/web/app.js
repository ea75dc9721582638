// The page's controls and what they do.

import { Cameras, ExchangeError, listCameras } from "./cameras.js";
import { play, watchFrames } from "./frames.js";
import { SourceError, exchangeProblem, keptSettings, openingProblem, questionHint } from "./messages.js";
import { fetchModel, showModel } from "./model.js";
import { fillScreen, toggleSmallWindow } from "./placement.js";
import { Screen } from "./screen.js";
import { Session } from "./session.js";
import { applyChanges, boundFields } from "./settings.js";
import { closeSource, describe, openClip, openFile, openScreen } from "./sources.js";
import { Slots } from "./slots.js";
import { createState } from "./state.js";
import { StillImage, openImage } from "./still.js";
import { save, toSrt, toVtt } from "./subtitles.js";
import { Transcript } from "./transcript.js";

class App {
  constructor(document) {
    this.document = document;
    this.state = createState();
    this.screen = new Screen(document, (time) => this.seek(time));
    this.session = new Session(this.state, this.screen);
    this.still = new StillImage(this.state, this.screen);
    this.cameras = new Cameras();
    this.video = this.screen.ui.video;
    this.choices = 0; // How often something was chosen to be shown.
    this.shown = 0; // The number of the choice that is shown; an older one comes too late.
    this.isPlacing = false; // A small window is being opened.
  }

  async start() {
    const { ui } = this.screen;
    this.onClick("[data-action=clip]", () => this.useSource(describe("Sample clip", "file"), openClip));
    this.onClick("[data-action=choose]", () => ui.file.click());
    this.onClick("[data-action=camera]", () => this.useCamera());
    this.onClick("[data-action=screen]", () => this.useSource(describe("Screen", "screen"), openScreen));
    this.onClick("[data-action=image]", () => ui["image-file"].click());
    this.onClick("#stop", () => this.stop());
    this.onClick("#reconnect", () => this.session.connect());
    this.onClick("#restart", () => this.restart());
    this.onClick("#full-screen", () => this.orProblem(() => fillScreen(ui.stage, this.video)));
    this.onClick("#small-window", () => this.toggleSmallWindow());
    this.onClick("#save-srt", () => this.save("srt", toSrt, "application/x-subrip"));
    this.onClick("#save-vtt", () => this.save("vtt", toVtt, "text/vtt"));
    this.onSubmit("#settings", () => this.applySettings());
    this.onSubmit("#question-form", () => this.askTyped());
    this.onSubmit("#key-form", () => this.useKey());
    ui.file.addEventListener("change", () => this.useFile(ui.file.files[0]));
    ui["image-file"].addEventListener("change", () => this.useFile(ui["image-file"].files[0]));
    ui.cameras.addEventListener("change", () => this.useCamera(ui.cameras.value));
    this.acceptDrops(this.document);
    navigator.mediaDevices?.addEventListener("devicechange", () => this.offerCameras());
    watchFrames(this.video, (time) => this.session.onVideoFrame(time));
    this.video.addEventListener("timeupdate", () => this.screen.caption());
    this.video.addEventListener("error", () => this.onBroken());
    this.screen.begin(this.state.transcript, null);
    this.screen.show(this.state, "Pick a video to begin");
    boundFields(this.document);
    this.state.model = await fetchModel();
    showModel(ui, this.state.model, (question) => this.ask(question));
    this.screen.allowQuestion(this.screen.mayAsk);
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

  /** Takes files that are dropped anywhere on a document; a browser would show them in its place. */
  acceptDrops(target) {
    const listen = (name, action) =>
      target.addEventListener(name, (event) => {
        if (!event.dataTransfer.types.includes("Files")) return; // Text goes where it is dropped.
        event.preventDefault();
        action(event);
      });
    const highlight = (on) => this.screen.ui.stage.toggleAttribute("data-drop", on);
    listen("dragover", () => highlight(true));
    listen("dragleave", ({ relatedTarget }) => highlight(relatedTarget !== null)); // Null: the page itself is left.
    listen("drop", ({ dataTransfer }) => {
      highlight(false);
      this.useFile(dataTransfer.files[0]);
    });
  }

  useFile(file) {
    if (!file) return;
    if (file.type.startsWith("image/")) this.useImage(file);
    else this.useSource(describe(file.name, "file"), () => openFile(file));
    const { ui } = this.screen;
    ui.file.value = ui["image-file"].value = ""; // So that the same file may be chosen again.
  }

  useCamera(id = "") {
    const open = () => this.cameras.open(id).catch((error) => this.returnToCamera(error));
    return this.useSource(describe("Camera", "camera"), open);
  }

  /** Goes on with the camera that was closed for another one, which failed. Returns null if this failed as well. */
  async returnToCamera(error) {
    const { former } = error;
    if (!(error instanceof ExchangeError)) throw error;
    if (this.state.source?.kind !== "camera") {
      former?.drop(); // Something else, or Stop, meanwhile.
    } else if (!former) {
      this.session.abandon();
      this.showNothing(exchangeProblem(error.message));
      return null;
    } else {
      this.session.frames.continueTime();
      if (await this.show(former)) this.goOn();
    }
    throw error;
  }

  /** Goes on with what is shown again in place of what was. */
  goOn() {
    if (this.state.phase === "opening") this.session.connect();
    else if (this.state.phase === "live") play(this.video);
    else this.state.playWhenLive = true;
  }

  /** Shows another video, if it can be opened; what is shown now goes on until then, but for a camera. */
  async useSource(source, open) {
    const choice = (this.choices += 1);
    const opened = await this.screen.whileOpening(this.orProblem(open));
    if (!opened) return;
    if (choice < this.shown) {
      opened.drop();
      return;
    }
    this.leave(choice, source);
    const isLoaded = await this.show(opened);
    if (choice !== this.shown) return; // Something else, or Stop, meanwhile.
    if (isLoaded) this.session.connect();
    else this.showNothing(openingProblem());
  }

  /** Puts what was opened into the video; returns whether it has a picture. */
  async show(opened) {
    const loaded = opened.show(this.video).then(() => true, () => false);
    // Sharing may also be ended by the browser's own button, a camera by pulling its plug.
    for (const track of opened.stream?.getTracks() ?? []) track.onended = () => this.stop();
    this.offerCameras();
    return loaded;
  }

  /** Offers the cameras while one is shown; their names are known by then. */
  async offerCameras() {
    const isCamera = () => this.state.source?.kind === "camera";
    const cameras = isCamera() ? await listCameras() : [];
    if (isCamera()) this.screen.offerCameras(cameras, this.cameras.id);
  }

  async useImage(file) {
    const choice = (this.choices += 1);
    const picture = await this.orProblem(() => openImage(file));
    if (choice < this.shown) picture?.close();
    else if (picture) {
      this.leave(choice, describe(file.name, "image"));
      this.still.open(picture);
    }
  }

  /** Returns what `open` gives, or null after its problem is shown. */
  async orProblem(open) {
    try {
      return await open();
    } catch (error) {
      if (!(error instanceof SourceError)) throw error;
      this.screen.temporaryProblem(error.message);
      return null;
    }
  }

  /** Leaves what is shown for another source, which is being opened from now on. */
  leave(choice, source) {
    this.shown = choice;
    this.reset(source);
    this.still.close();
    closeSource(this.video);
    Object.assign(this.state, { source, phase: "opening", idle: false, needsKey: false, playWhenLive: true });
    this.screen.problem("");
    this.screen.show(this.state, "Opening…", "busy");
  }

  showNothing(problem) {
    closeSource(this.video);
    Object.assign(this.state, { source: null, phase: "empty", needsKey: false });
    this.screen.show(this.state, "Pick a video to begin");
    this.screen.problem(problem);
  }

  /** A video cannot be played any further. */
  onBroken() {
    const { phase, source } = this.state;
    if (!source?.hasVideo || phase === "opening") return; // Whoever opens it finds out.
    this.session.abandon();
    this.showNothing(openingProblem());
  }

  /** Ends the session, and clears the transcript and the screen for a source, from its beginning. */
  reset(source) {
    // First: what is not finished is none of the new transcript, and no question is given back.
    this.state.transcript = new Transcript();
    this.screen.begin(this.state.transcript, source);
    this.session.abandon();
    this.state.slots = new Slots();
  }

  stop() {
    this.shown = this.choices += 1; // What is being opened comes too late.
    if (this.state.source?.isStream) {
      closeSource(this.video); // The camera is off; its captions stay.
      this.state.source = null;
    }
    this.session.stop();
  }

  restart() {
    const { source } = this.state;
    this.reset(source);
    if (source.canSeek) this.video.currentTime = 0;
    this.state.playWhenLive = true;
    this.session.connect();
  }

  applySettings() {
    this.state.wanted = applyChanges(this.screen.ui.settings, this.state.wanted);
    if (this.state.source) this.session.connect();
    else this.screen.applyHint(keptSettings());
  }

  useKey() {
    this.state.key = this.screen.ui.key.value;
    if (this.state.phase === "image") this.still.askAgain();
    else this.session.connect();
  }

  askTyped() {
    const { question } = this.screen.ui;
    if (this.ask(question.value.trim())) question.value = "";
  }

  /** Asks a question about what is shown, or shows why it cannot be asked now; returns whether it was asked. */
  ask(text) {
    if (!this.screen.mayAsk) this.screen.questionHint(questionHint(this.state));
    if (!text || !this.screen.mayAsk) return false;
    if (this.state.phase === "image") this.still.ask(text);
    else this.session.ask(text);
    return true;
  }

  seek(time) {
    if (this.state.source?.canSeek) this.video.currentTime = time;
  }

  /** A second press before the window is there is none. */
  async toggleSmallWindow() {
    if (this.isPlacing) return;
    this.isPlacing = true;
    const open = () => toggleSmallWindow(this.screen.ui.stage, this.video, (small) => this.acceptDrops(small));
    try {
      await this.orProblem(open);
    } finally {
      this.isPlacing = false;
    }
  }

  save(suffix, write, type) {
    const { source, transcript } = this.state;
    const name = (source?.name ?? "captions").replace(/\.[^.]*$/, "");
    const finished = transcript.captions.items.filter(({ done }) => done);
    save(`${name}.${suffix}`, write(finished, this.video.duration), type);
  }
}

new App(document).start();
