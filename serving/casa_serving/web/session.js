// A session: its connection and the server's events. What is sent of the video is in frame_sender.js.

import { Backoff } from "./backoff.js";
import { FrameSender } from "./frame_sender.js";
import { play } from "./frames.js";
import { LiveClient, address, authorization } from "./live_client.js";
import { fillSettings, namedFields } from "./settings.js";
import { connectProblem, endProblem, rejectionProblem, sessionSummary, settingsProblem } from "./messages.js";
import { fetchWithin } from "./silence.js";

const MAX_PROBE_MS = 5000;

export class Session {
  constructor(state, screen) {
    this.state = state;
    this.screen = screen;
    this.video = screen.ui.video;
    this.frames = new FrameSender(state, screen);
    this.backoff = new Backoff();
  }

  /** Opens a session as a person has asked for, if there is something to show it. */
  connect() {
    if (!this.state.source?.hasVideo) return;
    this.backoff.reset();
    this.screen.problem("");
    this.#open();
  }

  /** Opens a session with the captions so far as its history; abandons the one before. */
  #open() {
    this.abandon();
    const { state } = this;
    Object.assign(state, { fatal: null, summary: null, idle: false, phase: "connecting", needsKey: false });
    this.screen.show(state, "Connecting…", "busy");
    state.client = new LiveClient(
      { ...state.wanted, history: state.transcript.history() },
      state.key,
      (event) => this.onEvent(event),
      (end) => this.onEnd(end),
    );
  }

  /** Abandons the session, or what would open it again, and drops its unfinished captions and answers. */
  abandon() {
    this.backoff.cancel();
    this.state.client?.abandon();
    Object.assign(this.state, { client: null, stopping: false, asking: false });
    this.frames.end();
    this.#drop();
  }

  /** Drops what is not finished, or only that of one kind. A question is given back to the person who asked it. */
  #drop(kind = null) {
    for (const entry of this.state.transcript.dropUnfinished(kind)) {
      this.screen.remove(entry);
      if (entry.kind === "question") this.screen.giveBack(entry.question);
    }
  }

  /** Asks a question about the picture that is shown. */
  async ask(text) {
    const { frames, screen, state } = this;
    const { client, transcript } = state;
    state.questions += 1;
    const id = `q${state.questions}`;
    screen.asked();
    screen.entry(transcript.question(id, frames.time, text));
    screen.allowQuestion(false); // One at a time: the answer comes between two frames.
    state.asking = true;
    await frames.untilRead(client);
    if (client !== state.client) return;
    state.asking = false;
    client.ask(text, id);
    frames.look();
  }

  /** Handles a new picture of the video. */
  onVideoFrame(time) {
    if (!this.state.source?.hasVideo) return; // Another one is chosen.
    this.frames.show(time);
    if (this.state.idle && !this.video.paused) this.connect();
  }

  // Events of the server

  onEvent(event) {
    const { screen, state } = this;
    const handlers = {
      "session.created": () => this.onCreated(event),
      "caption.delta": () => this.onCaptionDelta(event),
      "frame.done": () => this.onFrameDone(event),
      "frame.dropped": () => this.onFrameDropped(event),
      "answer.delta": () => screen.entry(state.transcript.answerDelta(event)),
      "answer.done": () => this.onAnswerDone(event),
      "session.closed": () => this.onClosed(event),
      error: () => this.onError(event),
    };
    handlers[event.type]?.(); // A newer server may send others.
  }

  onCreated({ settings, limits }) {
    const { state, screen } = this;
    state.slots.begin(settings.fps);
    Object.assign(state, { settings, limits, phase: "live" });
    fillSettings(screen.ui.settings, settings);
    screen.problem("");
    screen.show(state, `Live at ${settings.fps} frames a second`, "live");
    this.frames.look(); // The first frame is on the screen already.
    if (state.playWhenLive) play(this.video);
    state.playWhenLive = false;
  }

  onCaptionDelta(event) {
    if (!this.#captionedBefore(event.frame)) this.screen.entry(this.state.transcript.captionDelta(event));
  }

  onFrameDone(event) {
    const { screen, state } = this;
    if (this.#captionedBefore(event.frame)) this.#captionAgain(event);
    else screen.entry(state.transcript.captionDone(event));
    state.slots.done(event.frame);
    screen.figures.frame(event, state.settings);
    this.backoff.reset();
    this.frames.look();
  }

  /** Whether a frame's slot had its caption, or its silence, before the frame was sent. */
  #captionedBefore(number) {
    const { slot } = this.state.slots.waiting.get(number);
    return this.state.slots.captioned.has(slot) || Boolean(this.#captionOf(slot)?.done);
  }

  #captionOf(slot) {
    return this.state.transcript.captionIn(...this.state.slots.span(slot));
  }

  /** Takes what was said about a frame that was sent again, in place of what was said about it before. */
  #captionAgain({ frame, caption }) {
    const entry = this.#captionOf(this.state.slots.waiting.get(frame).slot);
    if (!entry || !caption.trim() || entry.text === caption) return;
    entry.text = caption;
    this.screen.entry(entry);
  }

  onFrameDropped(event) {
    this.state.slots.dropped(event.frame, event.replaced_by);
    this.screen.figures.count("dropped");
  }

  onAnswerDone(event) {
    this.screen.entry(this.state.transcript.answerDone(event));
    this.screen.allowQuestion(true);
  }

  onError(event) {
    const { screen, state } = this;
    console.info(event.message); // For operators: it names options of the server.
    if (event.fatal) {
      state.fatal = event;
    } else if (state.phase === "connecting") {
      this.abandon();
      this.fail(this.#settingsProblem(event));
    } else {
      screen.temporaryProblem(rejectionProblem(event.code));
      if (event.frame !== null) state.slots.done(event.frame);
      else this.dropQuestion();
    }
  }

  #settingsProblem({ message }) {
    return settingsProblem(namedFields(this.screen.ui.settings, message));
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
    if (stopping || (state.summary && code === 1000)) {
      this.#showStopped(state.summary ?? "Stopped");
    } else if (!opened) {
      this.explainFailedConnect();
    } else if (state.fatal?.code === "idle_timeout") {
      Object.assign(state, { phase: "stopped", idle: true });
      this.screen.show(state, "No frame came for a while: goes on when the video plays");
    } else if (state.fatal?.code === "bad_settings") {
      this.fail(this.#settingsProblem(state.fatal));
    } else {
      this.retry(endProblem(state.fatal?.code, code));
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
    this.#halt();
    this.state.phase = "waiting";
    this.screen.problem(message);
    this.screen.show(this.state, "Reconnecting…", "busy");
    this.backoff.schedule(() => this.#open());
  }

  /** Shows an error that waiting does not mend, and pauses the video. */
  fail(message) {
    this.#halt();
    this.state.phase = this.state.source ? "stopped" : "empty";
    this.screen.problem(message);
    this.screen.show(this.state, "Not connected", "error");
  }

  /** Ends the session; its captions stay. */
  stop() {
    this.#halt();
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

  /** Pauses the video until there is a session again. */
  #halt() {
    this.state.playWhenLive ||= !this.video.paused;
    this.video.pause();
  }

  #showStopped(status) {
    Object.assign(this.state, { phase: this.state.source ? "stopped" : "empty", needsKey: false });
    this.screen.problem("");
    this.screen.show(this.state, status);
  }
}
