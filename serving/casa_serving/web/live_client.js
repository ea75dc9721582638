// The protocol of /v1/live: one WebSocket is one session. Independent of the page.

import { SilenceTimer } from "./silence.js";

const PROTOCOL = "casa-live";
const TIMESTAMP_BYTES = 8;
// A server answers each frame, if only that a newer one took its place; one that says nothing for so long is gone.
const MAX_SILENCE_MS = 20_000;
// The close code of a connection that ended without a close frame.
const LOST = 1006;
// Each message of a client is answered by one of these.
const ANSWERS = new Set(["session.created", "frame.done", "frame.dropped", "answer.done", "error"]);

/** Returns text as base64url without padding, as a subprotocol's name requires. */
export function base64url(text) {
  const bytes = String.fromCharCode(...new TextEncoder().encode(text));
  return btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** Returns the address of a path beside the page, for instance under a proxy's prefix. */
export function address(path, scheme = location.protocol) {
  const url = new URL(path, document.baseURI);
  url.protocol = scheme;
  return url.href;
}

/** Returns the HTTP headers of a key, "" for none. A header cannot hold every character; such a key is no server's. */
export function authorization(key) {
  return /^[\x20-\x7e]+$/.test(key) ? { Authorization: `Bearer ${key}` } : {};
}

function liveAddress() {
  return address("v1/live", location.protocol === "https:" ? "wss:" : "ws:");
}

export class LiveClient {
  /**
   * Connects and asks for a session.
   * @param {object} create fields of session.create: settings and history
   * @param {string} key API key, or ""
   * @param {(event: object) => void} onEvent gets every message of the server
   * @param {(end: {opened: boolean, code: number}) => void} onEnd is called once
   */
  constructor(create, key, onEvent, onEnd) {
    let opened = false;
    this.frames = 0; // How many were sent.
    this.owed = 0; // How many messages the server has not answered.
    this.silence = new SilenceTimer(MAX_SILENCE_MS, () => {
      this.abandon();
      onEnd({ opened, code: LOST });
    });
    // Browsers cannot set a header here; the server turns this subprotocol into one.
    this.socket = new WebSocket(liveAddress(), key ? [PROTOCOL, `casa-key.${base64url(key)}`] : [PROTOCOL]);
    this.socket.onopen = () => {
      opened = true;
      this.silence.heard();
      this.#sendText({ type: "session.create", ...create });
    };
    this.socket.onmessage = (message) => {
      const event = JSON.parse(message.data);
      this.#hear(event.type);
      onEvent(event);
    };
    this.socket.onclose = ({ code }) => {
      this.silence.heard();
      onEnd({ opened, code });
    };
    this.silence.expect();
  }

  /** Whether the last frame is still being sent: the next one would only queue up behind it. */
  get congested() {
    return this.socket.bufferedAmount > 0;
  }

  /** Sends a picture: the timestamp in seconds as a little-endian double, then the file. Returns the server's number. */
  sendFrame(picture, timestamp) {
    const header = new DataView(new ArrayBuffer(TIMESTAMP_BYTES));
    header.setFloat64(0, timestamp, true);
    this.#send(new Blob([header, picture]));
    this.frames += 1;
    return this.frames - 1;
  }

  ask(text, id) {
    this.#sendText({ type: "question", text, id });
  }

  /** Asks for the end; the server answers with statistics and closes. */
  stop() {
    this.#sendText({ type: "session.stop" });
  }

  /** Closes at once; nothing is reported any more. */
  abandon() {
    this.silence.heard();
    this.socket.onmessage = this.socket.onclose = null;
    this.socket.close();
  }

  #sendText(message) {
    this.#send(JSON.stringify(message));
  }

  #send(message) {
    if (this.socket.readyState !== WebSocket.OPEN) return;
    this.socket.send(message);
    this.owed += 1;
    this.silence.expect();
  }

  /** What is still owed has its time anew from each word on: the other side is there. */
  #hear(type) {
    if (ANSWERS.has(type)) this.owed -= 1;
    this.silence.heard();
    if (this.owed > 0) this.silence.expect();
  }
}
