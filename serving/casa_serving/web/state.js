// The state of the page: one object, made once and handed to whoever works on it.

import { Transcript } from "./transcript.js";

export function createState() {
  return {
    phase: "empty", // empty | connecting | live | stopped
    source: null, // {name, isCamera} of what is shown, or null.
    client: null, // The connection, which is the session, or null.
    settings: null, // What the server says the session's settings are.
    key: "",
    transcript: new Transcript(),
    seen: new Set(), // Numbers of the frames, in time at this fps, that were sent.
    encoding: false, // A picture is being made.
    questions: 0,
    fatal: null, // The server's last word before it closes, or null.
    farewell: null, // What there is to say after a stop, or null.
    asleep: false, // Closed for want of frames; goes on when the video does.
    playWhenLive: false,
  };
}
