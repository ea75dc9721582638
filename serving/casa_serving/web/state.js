// The state of the page: one object, created once and passed to all classes that use it.

import { Slots } from "./slots.js";
import { Transcript } from "./transcript.js";

export function createState() {
  return {
    phase: "empty", // empty | opening (a source) | connecting | live | waiting (to connect again) | stopped | image
    source: null, // What is shown, as `describe` of sources.js says it, or null.
    model: null, // {name, reads, questions}, from the server.
    client: null, // The connection, which is the session, or null.
    wanted: {}, // Settings that a person has changed and applied; the others are the server's.
    settings: null, // The session's settings, from the server.
    limits: null, // What the server accepts, from the server.
    key: "",
    needsKey: false, // The server asks for a key, or for another one.
    transcript: new Transcript(),
    slots: new Slots(),
    asking: false, // A question waits until the model has read the picture that it is about.
    questions: 0,
    fatal: null, // The server's fatal error event, or null.
    stopping: false, // The server was asked for the end; however it comes, it is no loss.
    summary: null, // The status text after a stop, or null.
    idle: false, // Closed by the idle timeout; reconnects when the video plays.
    playWhenLive: false, // The video was paused for want of a session, not by a person.
  };
}
