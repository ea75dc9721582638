// A chat about one image, over /v1/chat/completions. Independent of the page.

import { Backoff } from "./backoff.js";
import { address, authorization } from "./live_client.js";
import { answerProblem } from "./messages.js";
import { SilenceTimer } from "./silence.js";

const MAX_EXCHANGES = 8; // What the model reads again with each question.
const MAX_TRIES = 5;
// A question may wait for others, and an answer comes in pieces.
const MAX_SILENCE_MS = 60_000;

/** An answer that did not come. `needsKey`: the server asks for an API key, or for another one. */
export class AnswerError extends Error {
  constructor(status, hadKey) {
    super(answerProblem(status, hadKey));
    this.needsKey = status === 401;
  }
}

export class ImageChat {
  /**
   * @param {string | undefined} model its name at the server; undefined: the server's only one
   * @param {HTMLCanvasElement} canvas the image
   */
  constructor(model, canvas) {
    this.model = model;
    this.url = canvas.toDataURL("image/png");
    this.exchanges = []; // {question, answer}, the newest last.
    this.aborter = new AbortController();
    this.silence = new SilenceTimer(MAX_SILENCE_MS, () => this.close());
  }

  /** Yields the pieces of an answer. Rejects with AnswerError. */
  async *ask(question, key) {
    this.aborter = new AbortController();
    this.silence.expect();
    let answer = "";
    try {
      const response = await this.#post(question, key);
      for await (const text of deltas(response.body)) {
        this.silence.heard();
        this.silence.expect();
        answer += text;
        yield text;
      }
    } finally {
      this.silence.heard();
    }
    this.exchanges = [...this.exchanges, { question, answer }].slice(-MAX_EXCHANGES);
  }

  /** Ends what is being answered. */
  close() {
    this.aborter.abort();
  }

  async #post(question, key) {
    const request = {
      method: "POST",
      headers: { "Content-Type": "application/json", ...authorization(key) },
      body: JSON.stringify({ model: this.model, messages: this.#messages(question), stream: true }),
      signal: this.aborter.signal,
    };
    const backoff = new Backoff();
    for (;;) {
      const response = await fetch(address("v1/chat/completions"), request).catch(() => null);
      if (response?.ok) return response;
      const passes = response === null || [429, 502, 503, 504].includes(response.status);
      if (this.aborter.signal.aborted || !passes || backoff.tries >= MAX_TRIES) throw new AnswerError(response?.status ?? null, Boolean(key));
      await new Promise((resolve) => backoff.schedule(resolve));
    }
  }

  #messages(question) {
    const messages = this.exchanges.flatMap((exchange) => [
      { role: "user", content: exchange.question },
      { role: "assistant", content: exchange.answer },
    ]);
    messages.push({ role: "user", content: question });
    const image = { type: "image_url", image_url: { url: this.url } };
    messages[0] = { role: "user", content: [image, { type: "text", text: messages[0].content }] };
    return messages;
  }
}

/** Yields the text of a stream of server-sent events. */
async function* deltas(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => {
      throw new AnswerError(null, false); // The connection broke.
    });
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: {")) continue;
      const text = deltaOf(line.slice("data: ".length));
      if (text) yield text;
    }
  }
}

/** Returns the text of an event, if it has some. */
function deltaOf(data) {
  let event;
  try {
    event = JSON.parse(data);
  } catch {
    throw new AnswerError(502, false); // What a proxy says, and no server.
  }
  if (event.error) throw new AnswerError(event.error.code ?? 500, false);
  return event.choices?.[0]?.delta?.content;
}
