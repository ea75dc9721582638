// The captions as a text track of the video, which browsers draw where the page does not: in full screen and in a
// picture in picture. On the page itself the caption stands under the picture, which it never covers.

const END_S = 1e9; // A caption stands until the next one.

export class CaptionTrack {
  /** @param {HTMLVideoElement} video */
  constructor(video) {
    this.video = video;
    this.track = video.addTextTrack("captions", "Captions", "en");
    this.cues = new Map(); // Entry -> its cue.
    this.offset = 0; // The transcript's time at which the video's begins.
    const events = ["enterpictureinpicture", "leavepictureinpicture", "webkitbeginfullscreen", "webkitendfullscreen"];
    for (const name of events) video.addEventListener(name, () => this.#choosePlace());
    document.addEventListener("fullscreenchange", () => this.#choosePlace());
    this.#choosePlace();
  }

  /** Shows an entry as it is now. @param {Timeline} captions all of them */
  show(entry, captions) {
    if (!this.cues.has(entry)) this.#add(entry, captions);
    this.cues.get(entry).text = plain(entry.text.trim());
  }

  remove(entry, captions) {
    if (!this.cues.has(entry)) return;
    this.track.removeCue(this.cues.get(entry));
    this.cues.delete(entry);
    this.#setEnd(captions.at(entry.timestamp), captions);
  }

  /** Begins without captions. @param {number} offset the transcript's time at which the video's begins */
  clear(offset) {
    for (const cue of this.cues.values()) this.track.removeCue(cue);
    this.cues.clear();
    this.offset = offset;
  }

  #add(entry, captions) {
    const cue = new VTTCue(entry.timestamp - this.offset, END_S, "");
    this.cues.set(entry, cue);
    this.track.addCue(cue);
    this.#setEnd(entry, captions);
    this.#setEnd(captions.before(entry), captions);
  }

  /** Ends an entry's cue where the next one begins. */
  #setEnd(entry, captions) {
    const cue = this.cues.get(entry);
    if (cue) cue.endTime = (captions.after(entry)?.timestamp ?? END_S) - this.offset;
  }

  #choosePlace() {
    const { video } = this;
    const alone = [document.fullscreenElement, document.pictureInPictureElement].includes(video);
    this.track.mode = alone || video.webkitDisplayingFullscreen ? "showing" : "hidden";
  }
}

/** Returns text in which nothing is WebVTT's markup. */
function plain(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}
