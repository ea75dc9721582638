// A session: its connection, the server's events, and the frames that are sent.

import { Backoff } from "./backoff.js";
import { play, takePicture } from "./frames.js";
import { LiveClient, address, authorization } from "./live_client.js";
import { fillSettings, readSettings } from "./settings.js";
import { connectProblem, endProblem, sessionSummary } from "./messages.js";
import { fetchWithin } from "./silence.js";

const MAX_PROBE_MS = 5000;

export class Session {
  constructor(state, screen) {
    this.state = state;
    this.screen = screen;
    this.video = screen.ui.video;
    this.canvas = document.createElement("canvas");
    this.backoff = new Backoff();
  }

  /** Opens a session as a person has asked for, if there is something to show it. */
  connect(playWhenLive) {
    if (!this.state.source) return;
    this.backoff.reset();
    this.screen.problem("");
    this.#open(playWhenLive);
  }

  /** Opens a session with the captions so far as its history; abandons the one before. */
  #open(playWhenLive) {
    this.abandon();
    Object.assign(this.state, { playWhenLive, fatal: null, summary: null, idle: false, phase: "connecting", needsKey: false });
    this.screen.show(this.state, "Connecting…", "busy");
    const create = { ...readSettings(this.screen.ui.settings), history: this.state.transcript.history() };
    this.state.client = new LiveClient(
      create,
      this.state.key,
      (event) => this.onEvent(event),
      (end) => this.onEnd(end),
    );
  }

  /** Abandons the session, or what would open it again, and drops its unfinished captions and answers. */
  abandon() {
    this.backoff.cancel();
    this.state.client?.abandon();
    Object.assign(this.state, { client: null, stopping: false });
    this.#drop(null);
  }

  #drop(kind) {
    const { transcript } = this.state;
    for (const entry of transcript.dropUnfinished(kind)) this.screen.remove(entry, transcript);
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
    screen.problem("");
    screen.show(state, `Live at ${settings.fps} frames a second`, "live");
    this.onVideoFrame(this.video.currentTime); // The first frame is on the screen already.
    if (state.playWhenLive) play(this.video);
    state.playWhenLive = false;
  }

  onFrameDone(event) {
    this.screen.entry(this.state.transcript.captionDone(event), this.state.transcript);
    this.screen.figures.frame(event, this.state.settings);
    this.backoff.reset();
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
    this.#drop("question");
    this.screen.allowQuestion(true);
  }

  onClosed({ statistics }) {
    if (!this.state.fatal) this.state.summary = sessionSummary(statistics);
  }

  onEnd({ opened, code }) {
    const { state } = this;
    const { stopping } = state;
    this.abandon();
    if (state.fatal) console.info(state.fatal.message); // For operators: it names options of the server.
    if (stopping || (state.summary && code === 1000)) {
      this.#showStopped(state.summary ?? "Stopped");
    } else if (!opened) {
      this.explainFailedConnect();
    } else if (state.fatal?.code === "idle_timeout") {
      Object.assign(state, { phase: "stopped", idle: true });
      this.screen.show(state, "No frame came for a while: goes on when the video plays");
    } else if (state.fatal?.code === "bad_settings") {
      this.fail(state.fatal.message);
    } else {
      this.retry(endProblem(state.fatal, code));
    }
  }

  /** Finds out why a WebSocket was rejected, which browsers do not report, by a plain request. */
  async explainFailedConnect() {
    const { state } = this;
    const { key, source } = state;
    const answer = await fetchWithin(MAX_PROBE_MS, address("v1/models"), { headers: authorization(key) });
    // Another try, another video, or Stop, meanwhile.
    if (state.phase !== "connecting" || state.client || state.source !== source) return;
    const problem = connectProblem(answer?.status ?? null, Boolean(key));
    state.needsKey = answer?.status === 401;
    if (state.needsKey) this.fail(problem);
    else this.retry(problem);
  }

  /** Pauses the video, so that nothing is missed, and connects again after a while. */
  retry(message) {
    const resume = this.state.playWhenLive || !this.video.paused;
    Object.assign(this.state, { phase: "waiting", playWhenLive: resume });
    this.video.pause();
    this.screen.problem(message);
    this.screen.show(this.state, "Reconnecting…", "busy");
    this.backoff.schedule(() => this.#open(resume));
  }

  /** Shows an error that waiting does not mend, and pauses the video. */
  fail(message) {
    this.state.phase = this.state.source ? "stopped" : "empty";
    this.video.pause();
    this.screen.problem(message);
    this.screen.show(this.state, "Not connected", "error");
  }

  /** Ends the session; its captions stay. */
  stop() {
    this.video.pause();
    const { state } = this;
    if (state.phase === "live" && !state.stopping) {
      state.stopping = true;
      state.client.stop(); // The server answers with statistics.
      this.screen.show(state, "Stopping…", "busy");
      this.screen.allowQuestion(false);
      return;
    }
    this.abandon();
    this.#showStopped("Stopped");
  }

  #showStopped(status) {
    Object.assign(this.state, { phase: this.state.source ? "stopped" : "empty", needsKey: false });
    this.screen.problem("");
    this.screen.show(this.state, status);
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
