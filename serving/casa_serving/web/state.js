// The state of the page: one object, created once and passed to all classes that use it.

import { Transcript } from "./transcript.js";

export function createState() {
  return {
    phase: "empty", // empty | opening (a source) | connecting | live | waiting (to connect again) | stopped | image
    source: null, // {name, kind} of what is shown, or null; kind: file | camera | screen | image.
    model: null, // {name, reads, questions}, from the server.
    client: null, // The connection, which is the session, or null.
    settings: null, // The session's settings, from the server.
    limits: null, // What the server accepts, from the server.
    key: "",
    needsKey: false, // The server asks for a key, or for another one.
    transcript: new Transcript(),
    seen: new Set(), // Numbers of the frames, in time at this fps, that were sent.
    encoding: false, // A frame is being encoded.
    questions: 0,
    fatal: null, // The server's fatal error event, or null.
    stopping: false, // The server was asked for the end; however it comes, it is no loss.
    summary: null, // The status text after a stop, or null.
    idle: false, // Closed by the idle timeout; reconnects when the video plays.
    playWhenLive: false,
  };
}
