// The list of captions and answers beside the video. What can be gone to is a button; all of them are one stop of Tab.

/** Returns a time as m:ss.t, with hours where there are some. */
export function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  const [hours, minutes] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60];
  const rest = ((tenths % 600) / 10).toFixed(1).padStart(4, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

/** Returns what an entry says as it is now. */
export function said({ text, done }) {
  return text || (done ? "No answer" : "…");
}

export class TranscriptView {
  /** @param {(time: number) => void} onSeek is called when an entry is chosen */
  constructor(list, scroll, hint, onSeek) {
    Object.assign(this, { list, scroll, hint, onSeek });
    this.items = new Map(); // Entry -> its <li>.
    this.current = null;
    this.canChoose = true; // An entry can be gone to.
    this.reached = null; // The entry that Tab goes to; the arrow keys go on from there.
    this.newest = null;
    this.isAtEnd = true; // The newest entry is in sight.
    this.isMoving = false; // The list moves with the next picture.
    this.asked = null; // The question that it moves to; null: it goes to its end, if that was in sight.
    list.addEventListener("keydown", (event) => this.#onKey(event));
    list.addEventListener("focusout", () => this.#reach(this.newest));
    scroll.addEventListener("scroll", () => this.#onScroll());
    // A window that shrinks or a phone that turns does not hide the newest entry.
    new ResizeObserver(() => this.#moveTo(null)).observe(scroll);
  }

  /** Shows an entry as it is now: adds it at its place, or updates its text. @param {Timeline} entries all of them */
  show(entry, entries) {
    if (!this.items.has(entry)) this.#insert(entry, entries);
    this.items.get(entry).querySelector(".text").textContent = said(entry);
    this.hint.hidden = true;
    if (entry.kind === "question") this.#moveTo(entry);
    else if (entries.last === entry && this.isAtEnd) this.#moveTo(null);
  }

  /** Takes an entry away. @param {Timeline} entries those that are left */
  remove(entry, entries) {
    const item = this.items.get(entry);
    this.newest = entries.last;
    if (item?.contains(document.activeElement)) this.#keepFocus(item.previousElementSibling ?? item.nextElementSibling);
    item?.remove();
    this.items.delete(entry);
    if (entry === this.reached) this.#reach(this.newest);
  }

  /** Marks the caption that belongs to what the video shows. */
  mark(entry) {
    if (entry === this.current) return;
    this.items.get(this.current)?.removeAttribute("aria-current");
    this.items.get(entry)?.setAttribute("aria-current", "true");
    this.current = entry;
  }

  /** Begins anew with a hint on what is going to be listed, and whether that can be gone to. */
  clear({ hint, canChoose }) {
    if (this.list.contains(document.activeElement)) this.#keepFocus(null);
    this.items.clear();
    this.list.replaceChildren();
    this.current = this.reached = this.newest = this.asked = null;
    this.isAtEnd = true;
    this.canChoose = canChoose;
    this.hint.textContent = hint;
    this.hint.hidden = false;
  }

  /** Goes through the list by the arrow keys, Home and End: one stop of Tab, however many captions there are. */
  #onKey(event) {
    const { previousElementSibling: before, nextElementSibling: after } = event.target.closest("li");
    const { firstElementChild: first, lastElementChild: last } = this.list;
    const next = { ArrowDown: after, ArrowUp: before, Home: first, End: last }[event.key];
    if (!next) return;
    event.preventDefault();
    next.querySelector("button").focus();
  }

  /** Gives the focus of an item that goes to another one, or to the list itself. */
  #keepFocus(item) {
    (item?.querySelector("button") ?? this.scroll).focus();
  }

  #onScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroll;
    this.isAtEnd = scrollHeight - scrollTop - clientHeight < 150; // About two entries.
  }

  /** Once a picture: the browser lays out the list then anyway, and not for each token. */
  #moveTo(question) {
    this.asked = question ?? this.asked;
    if (this.isMoving) return;
    this.isMoving = true;
    requestAnimationFrame(() => {
      this.isMoving = false;
      if (this.asked) this.#bringIntoSight(this.items.get(this.asked));
      else if (this.isAtEnd) this.scroll.scrollTop = this.scroll.scrollHeight;
      this.asked = null;
    });
  }

  #bringIntoSight(item) {
    if (!item) return; // Its question was dropped meanwhile.
    const [inner, outer] = [item, this.scroll].map((element) => element.getBoundingClientRect());
    this.scroll.scrollTop += Math.min(inner.top - outer.top, 0) || Math.max(inner.bottom - outer.bottom, 0);
    this.#onScroll();
  }

  #reach(entry) {
    this.items.get(this.reached)?.querySelector("button")?.setAttribute("tabindex", "-1");
    this.items.get(entry)?.querySelector("button")?.setAttribute("tabindex", "0");
    this.reached = entry;
  }

  #insert(entry, entries) {
    const item = this.#build(entry);
    this.list.insertBefore(item, this.items.get(entries.after(entry)) ?? null);
    this.items.set(entry, item);
    this.newest = entries.last;
    // Who goes through the list stays where they are; who comes to it gets what is in sight.
    if (!this.list.contains(document.activeElement)) this.#reach(this.newest);
  }

  #build(entry) {
    const item = document.createElement("li");
    item.className = entry.kind;
    const place = this.canChoose ? this.#buildButton(entry) : document.createElement("div");
    place.append(part("time", "time", clock(entry.timestamp)));
    if (entry.kind === "question") place.append(part("span", "asked", entry.question));
    place.append(part("span", "text", ""));
    item.append(place);
    return item;
  }

  #buildButton(entry) {
    const button = document.createElement("button");
    button.type = "button";
    button.tabIndex = -1;
    button.addEventListener("focus", () => this.#reach(entry));
    button.addEventListener("click", () => this.onSeek(entry.timestamp));
    return button;
  }
}

function part(tag, name, text) {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}
