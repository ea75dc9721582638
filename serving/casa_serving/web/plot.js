// A small live plot in SVG; colours and strokes come from the style sheet.

import { Series, roundUp } from "./series.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 100;
const MIN_FRAMES = 40; // So that the first few frames do not fill the plot.

export class Plot {
  /**
   * @param {HTMLElement} parent
   * @param {string} title
   * @param {{key: string, label: string}[]} lines drawn by class `line-<key>`; "dropped" is drawn as marks
   * @param {(value: number) => string} format writes a value with its unit
   */
  constructor(parent, title, lines, format) {
    this.format = format;
    this.figure = append(parent, "figure", "plot");
    const caption = append(this.figure, "figcaption");
    append(caption, "span", "title", title);
    this.value = append(caption, "span", "value", "–");
    this.lines = lines.map(({ key, label }) => ({ key, label, series: new Series() }));
    this.title = title;
    this.#drawFrame();
    this.#drawLegend(lines);
    this.#describe("no frame yet");
  }

  /** Adds one frame's numbers, by line, and draws; `headline` is what is written beside the title. */
  push(values, headline) {
    for (const { key, series } of this.lines) series.push(values[key]);
    this.value.textContent = headline;
    this.#describe(headline);
    this.#draw();
  }

  #describe(text) {
    this.svg.setAttribute("aria-label", `${this.title}: ${text}`);
  }

  #drawFrame() {
    const area = append(this.figure, "div", "area");
    this.heights = axis(area, "heights", 3); // From the top to zero.
    this.svg = area.appendChild(element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" }));
    for (const y of [0, HEIGHT / 2, HEIGHT]) {
      this.svg.append(element("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y }));
    }
    for (const line of this.lines) {
      line.path = this.svg.appendChild(element("path", { class: `line line-${line.key}` }));
    }
    this.frames = axis(area, "frames", 3);
  }

  #drawLegend(lines) {
    const legend = append(this.figure, "p", "legend");
    for (const { key, label } of lines) append(legend, "span", `key key-${key}`, label);
  }

  #draw() {
    const curves = this.lines.filter(({ key }) => key !== "dropped");
    const top = roundUp(1.05 * Math.max(...curves.map(({ series }) => series.max)));
    const { points, perPoint } = this.lines[0].series;
    const width = Math.max(points.length - 1, MIN_FRAMES / perPoint);
    const step = WIDTH / width;
    write(this.heights, [top, top / 2, 0].map(this.format));
    const last = Math.round(width * perPoint);
    write(this.frames, ["0", String(Math.round(last / 2)), `${last} frames`]);
    for (const { key, series, path } of this.lines) {
      path.setAttribute("d", key === "dropped" ? marks(series.points, step) : curve(series.points, step, top));
    }
  }
}

function curve(points, step, top) {
  const spots = points.map((value, index) => `${(index * step).toFixed(2)} ${(HEIGHT * (1 - value / top)).toFixed(2)}`);
  return spots.length ? `M${spots.join("L")}` : "";
}

function marks(points, step) {
  return points.map((value, index) => (value ? `M${(index * step).toFixed(2)} ${HEIGHT}v-14` : "")).join("");
}

/** Appends the labels of an axis. */
function axis(area, name, count) {
  const labels = append(area, "div", `axis ${name}`);
  labels.setAttribute("aria-hidden", "true"); // The headline is read out.
  return Array.from({ length: count }, () => append(labels, "span"));
}

function write(labels, texts) {
  for (const [index, label] of labels.entries()) label.textContent = texts[index];
}

function element(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function append(parent, tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return parent.appendChild(made);
}
