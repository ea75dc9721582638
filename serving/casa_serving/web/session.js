// A session: its connection, the server's events, and the frames that are sent.

import { play, takePicture } from "./frames.js";
import { LiveClient, address } from "./live_client.js";
import { fillSettings, readSettings } from "./settings.js";
import { connectProblem, endProblem, sessionSummary } from "./messages.js";

export class Session {
  constructor(state, screen) {
    this.state = state;
    this.screen = screen;
    this.video = screen.ui.video;
    this.canvas = document.createElement("canvas");
  }

  /** Opens a session with the captions so far as its history; abandons the one before. */
  connect(playWhenLive) {
    this.abandon();
    Object.assign(this.state, { playWhenLive, fatal: null, summary: null, idle: false, phase: "connecting" });
    this.screen.problem("");
    this.screen.ui["key-form"].hidden = true;
    this.screen.show(this.state, "Connecting…", "busy");
    const create = { ...readSettings(this.screen.ui.settings), history: this.state.transcript.history() };
    this.state.client = new LiveClient(
      create,
      this.state.key,
      (event) => this.onEvent(event),
      (end) => this.onEnd(end),
    );
  }

  /** Abandons the session and drops its unfinished captions and answers. */
  abandon() {
    this.state.client?.abandon();
    this.state.client = null;
    for (const entry of this.state.transcript.dropUnfinished()) this.screen.view.remove(entry);
  }

  ask(text) {
    this.state.questions += 1;
    const id = `q${this.state.questions}`;
    this.screen.entry(this.state.transcript.question(id, this.video.currentTime, text), this.state.transcript);
    this.screen.allowQuestion(false); // One at a time: the answer comes between two frames.
    this.state.client.ask(text, id);
  }

  // Events of the server

  onEvent(event) {
    const { transcript } = this.state;
    const handlers = {
      "session.created": () => this.onCreated(event),
      "caption.delta": () => this.screen.entry(transcript.captionDelta(event), transcript),
      "frame.done": () => this.onFrameDone(event),
      "frame.dropped": () => this.onFrameDropped(event),
      "answer.delta": () => this.screen.entry(transcript.answerDelta(event), transcript),
      "answer.done": () => this.onAnswerDone(event),
      "session.closed": () => this.onClosed(event),
      error: () => this.onError(event),
    };
    handlers[event.type]?.(); // A newer server may send others.
  }

  onCreated({ settings, limits }) {
    const { state, screen } = this;
    if (settings.fps !== state.settings?.fps) state.seen.clear();
    Object.assign(state, { settings, limits, phase: "live" });
    fillSettings(screen.ui.settings, settings);
    screen.show(state, `Live at ${settings.fps} frames a second`, "live");
    this.onVideoFrame(this.video.currentTime); // The first frame is on the screen already.
    if (state.playWhenLive) play(this.video);
  }

  onFrameDone(event) {
    this.screen.entry(this.state.transcript.captionDone(event), this.state.transcript);
    this.screen.figures.frame(event, this.state.settings);
  }

  onFrameDropped({ timestamp }) {
    this.state.seen.delete(this.frameNumber(timestamp)); // Gets another chance when it is played again.
    this.screen.figures.count("dropped");
  }

  onAnswerDone(event) {
    this.screen.entry(this.state.transcript.answerDone(event), this.state.transcript);
    this.screen.allowQuestion(true);
  }

  onError(event) {
    if (event.fatal) {
      this.state.fatal = event;
    } else if (this.state.phase === "connecting") {
      this.abandon();
      this.fail(event.message);
    } else {
      this.screen.temporaryProblem(event.message);
      if (event.frame === null) this.dropQuestion();
    }
  }

  /** Drops the question that was rejected. */
  dropQuestion() {
    const gone = this.state.transcript.dropUnfinished("question");
    for (const entry of gone) this.screen.view.remove(entry);
    this.screen.allowQuestion(true);
  }

  onClosed({ statistics }) {
    if (!this.state.fatal) this.state.summary = sessionSummary(statistics);
  }

  onEnd({ opened, code }) {
    const { state } = this;
    this.abandon();
    if (!opened) {
      this.explainFailedConnect();
    } else if (state.summary && code === 1000) {
      state.phase = state.source ? "stopped" : "empty";
      this.screen.show(state, state.summary);
    } else if (state.fatal?.code === "idle_timeout") {
      Object.assign(state, { phase: "stopped", idle: true });
      this.screen.show(state, "No frame came for a while: goes on when the video plays");
    } else {
      this.fail(endProblem(state.fatal, code));
    }
  }

  /** Finds out why a WebSocket was rejected, which browsers do not report, by a plain request. */
  async explainFailedConnect() {
    const { key } = this.state;
    // A header cannot hold every character; a key that has others is none of this server's.
    const headers = /^[\x20-\x7e]+$/.test(key) ? { Authorization: `Bearer ${key}` } : {};
    const answer = await fetch(address("v1/models"), { headers }).catch(() => null);
    this.fail(connectProblem(answer?.status ?? null, Boolean(key)));
    this.screen.ui["key-form"].hidden = answer?.status !== 401;
  }

  /** Shows an error and pauses the video, so that nothing is missed until it goes on. */
  fail(message) {
    this.state.phase = this.state.source ? "stopped" : "empty";
    this.video.pause();
    this.screen.problem(message);
    this.screen.show(this.state, "Not connected", "error");
  }

  // Frames

  /** Returns the number of the frame that a time belongs to, at the session's fps. */
  frameNumber(time) {
    return Math.floor(time * this.state.settings.fps + 1e-3);
  }

  /** Handles a new picture of the video: shows its caption, and sends it if the next frame is due. */
  onVideoFrame(time) {
    const { state, screen } = this;
    screen.caption(state.transcript, time);
    if (state.idle && !this.video.paused) this.connect(true);
    if (state.phase !== "live" || state.seen.has(this.frameNumber(time))) return;
    state.seen.add(this.frameNumber(time));
    if (state.encoding || state.client.congested) screen.figures.count("skipped");
    else this.sendFrame(state.client, time);
  }

  async sendFrame(client, time) {
    this.state.encoding = true;
    const picture = await takePicture(this.video, this.canvas, this.state.limits);
    this.state.encoding = false;
    if (client !== this.state.client || !picture) return;
    client.sendFrame(picture, time);
    this.screen.figures.count("sent");
  }
}
