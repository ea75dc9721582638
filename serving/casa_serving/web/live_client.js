// The protocol of /v1/live: one WebSocket is one session. Independent of the page.

import { SilenceTimer } from "./silence.js";

const PROTOCOL = "casa-live";
const TIMESTAMP_BYTES = 8;
// A server answers each frame, if only that a newer one took its place; one that says nothing for so long is gone.
const MAX_SILENCE_MS = 20_000;
// The close code of a connection that ended without a close frame.
const LOST = 1006;

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
   * @param {(end: {opened: boolean, code: number, reason: string}) => void} onEnd is called once
   */
  constructor(create, key, onEvent, onEnd) {
    let opened = false;
    this.silence = new SilenceTimer(MAX_SILENCE_MS, () => {
      this.abandon();
      onEnd({ opened, code: LOST, reason: "silent" });
    });
    // Browsers cannot set a header here; the server turns this subprotocol into one.
    this.socket = new WebSocket(liveAddress(), key ? [PROTOCOL, `casa-key.${base64url(key)}`] : [PROTOCOL]);
    this.socket.onopen = () => {
      opened = true;
      this.silence.heard();
      this.#send({ type: "session.create", ...create });
    };
    this.socket.onmessage = (message) => {
      this.silence.heard();
      onEvent(JSON.parse(message.data));
    };
    this.socket.onclose = ({ code, reason }) => {
      this.silence.heard();
      onEnd({ opened, code, reason });
    };
    this.silence.expect();
  }

  /** Whether the last frame is still being sent: the next one would only queue up behind it. */
  get congested() {
    return this.socket.bufferedAmount > 0;
  }

  /** Sends a picture: the timestamp in seconds as a little-endian double, then the file. */
  sendFrame(picture, timestamp) {
    const header = new DataView(new ArrayBuffer(TIMESTAMP_BYTES));
    header.setFloat64(0, timestamp, true);
    this.socket.send(new Blob([header, picture]));
    this.silence.expect();
  }

  ask(text, id) {
    this.#send({ type: "question", text, id });
  }

  /** Asks for the end; the server answers with statistics and closes. */
  stop() {
    this.#send({ type: "session.stop" });
  }

  /** Closes at once; nothing is reported any more. */
  abandon() {
    this.silence.heard();
    this.socket.onmessage = this.socket.onclose = null;
    this.socket.close();
  }

  #send(message) {
    if (this.socket.readyState !== WebSocket.OPEN) return;
    this.socket.send(JSON.stringify(message));
    this.silence.expect();
  }
}
