// The cameras of this machine. One is open at a time: many phones cannot open two.

import { SourceError, cameraProblem } from "./messages.js";
import { openStream } from "./sources.js";

/** A camera that could not be opened in place of another. `former`: that one, opened again, or null if it failed too. */
export class ExchangeError extends SourceError {
  constructor(message, former) {
    super(message);
    this.former = former;
  }
}

export class Cameras {
  #turn = Promise.resolve(); // Settled when the camera that was asked for last is open, or is not.
  #track = null;
  id = ""; // Of the one that is open, or was last.

  /**
   * Opens a camera, the browser's own choice with "", after closing the one that is open.
   * Rejects with SourceError, with ExchangeError where another one was open. @returns {Promise<Opened>}
   */
  open(id = "") {
    const opened = this.#turn.then(() => this.#exchange(id));
    this.#turn = opened.catch(() => undefined);
    return opened;
  }

  async #exchange(id) {
    const former = this.#track?.readyState === "live" ? this.id : null;
    this.#track?.stop();
    try {
      return await this.#open(id);
    } catch (error) {
      if (former === null) throw error;
      throw new ExchangeError(error.message, await this.#open(former).catch(() => null));
    }
  }

  async #open(id) {
    if (!navigator.mediaDevices) throw new SourceError(cameraProblem("insecure"));
    const device = id ? { deviceId: { exact: id } } : { facingMode: "environment" };
    const wanted = { video: { width: { ideal: 1280 }, ...device } };
    const opened = await openStream(() => navigator.mediaDevices.getUserMedia(wanted), cameraProblem);
    [this.#track] = opened.stream.getTracks();
    this.id = this.#track.getSettings().deviceId;
    return opened;
  }
}

/** Returns the cameras as {id, name}; their names are known once one was allowed. */
export async function listCameras() {
  const devices = await navigator.mediaDevices.enumerateDevices();
  const cameras = devices.filter(({ kind }) => kind === "videoinput");
  return cameras.map(({ deviceId, label }, index) => ({ id: deviceId, name: label || `Camera ${index + 1}` }));
}
