// A still image to ask about, in place of a video: a chat beside the live sessions.

import { AnswerError, ImageChat } from "./image_chat.js";
import { SourceError, imageProblem } from "./messages.js";

const MAX_SIDE = 640;

/** Returns an image file's picture; rejects with an error message if the browser cannot show it. */
export async function openImage(file) {
  try {
    return await createImageBitmap(file);
  } catch {
    throw new SourceError(imageProblem(file));
  }
}

export class StillImage {
  constructor(state, screen) {
    this.state = state;
    this.screen = screen;
    this.chat = null;
    this.unanswered = null; // The question that waits for an API key.
  }

  /** Shows a picture, scaled down, and takes questions about it. */
  open(name, picture) {
    const { still } = this.screen.ui;
    const scale = Math.min(1, MAX_SIDE / Math.max(picture.width, picture.height));
    still.width = Math.max(1, Math.round(picture.width * scale));
    still.height = Math.max(1, Math.round(picture.height * scale));
    still.getContext("2d").drawImage(picture, 0, 0, still.width, still.height);
    this.chat = new ImageChat(this.state.model?.name, still);
    Object.assign(this.state, { source: { name, kind: "image" }, phase: "image" });
    this.screen.problem("");
    this.#show(false);
  }

  #show(needsKey) {
    this.state.needsKey = needsKey;
    this.screen.show(this.state, "Ask about the image");
  }

  close() {
    this.chat?.close();
    this.chat = this.unanswered = null;
  }

  async ask(text) {
    const { state, screen, chat } = this;
    const { transcript } = state;
    state.questions += 1;
    const id = `i${state.questions}`;
    screen.entry(transcript.question(id, 0, text), transcript);
    screen.allowQuestion(false);
    screen.problem("");
    let answer = "";
    try {
      for await (const piece of chat.ask(text, state.key)) {
        answer += piece;
        screen.entry(transcript.answerDelta({ id, text: piece }), transcript);
      }
      screen.entry(transcript.answerDone({ id, text: answer }), transcript);
    } catch (error) {
      if (chat !== this.chat) return; // Something else is shown now.
      this.#fail(error, text);
    }
    if (chat === this.chat) screen.allowQuestion(true);
  }

  /** Asks again what waited for a key. */
  askAgain() {
    this.#show(false);
    if (this.unanswered) this.ask(this.unanswered);
  }

  #fail(error, text) {
    if (!(error instanceof AnswerError)) throw error;
    const { state, screen } = this;
    for (const entry of state.transcript.dropUnfinished()) screen.remove(entry, state.transcript);
    screen.problem(error.message);
    this.unanswered = error.needsKey ? text : null;
    this.#show(error.needsKey);
  }
}
