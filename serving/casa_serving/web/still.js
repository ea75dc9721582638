// A still image to ask about, in place of a video: a chat beside the live sessions.

import { draw } from "./frames.js";
import { AnswerError, ImageChat } from "./image_chat.js";
import { SourceError, imageProblem } from "./messages.js";

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
  open(picture) {
    const { still } = this.screen.ui;
    draw(still, picture, picture.width, picture.height);
    picture.close();
    this.chat = new ImageChat(this.state.model?.name, still);
    this.state.phase = "image";
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
    screen.asked();
    screen.entry(transcript.question(id, 0, text));
    screen.allowQuestion(false);
    screen.problem("");
    let answer = "";
    try {
      for await (const piece of chat.ask(text, state.key)) {
        answer += piece;
        screen.entry(transcript.answerDelta({ id, text: piece }));
      }
      screen.entry(transcript.answerDone({ id, text: answer }));
    } catch (error) {
      if (chat === this.chat) this.#fail(error, text); // Else something else is shown now.
    } finally {
      if (chat === this.chat) screen.allowQuestion(true);
    }
  }

  /** Asks again what waited for a key. */
  askAgain() {
    this.#show(false);
    if (this.unanswered) this.ask(this.unanswered);
  }

  #fail(error, text) {
    if (!(error instanceof AnswerError)) throw error;
    const { state, screen } = this;
    for (const entry of state.transcript.dropUnfinished()) screen.remove(entry);
    screen.problem(error.message);
    this.unanswered = error.needsKey ? text : null;
    this.#show(error.needsKey);
    if (!error.needsKey) screen.giveBack(text);
  }
}
