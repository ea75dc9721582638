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
   */
  constructor(parent, title, lines) {
    this.figure = append(parent, "figure", "plot");
    const caption = append(this.figure, "figcaption");
    append(caption, "span", "title", title);
    this.value = append(caption, "span", "value", "–");
    this.lines = lines.map(({ key, label }) => ({ key, label, series: new Series() }));
    this.#drawFrame();
    this.#drawLegend(lines);
  }

  /** Adds one frame's numbers, by line, and draws; `headline` is what is written beside the title. */
  push(values, headline) {
    for (const { key, series } of this.lines) series.push(values[key]);
    this.value.textContent = headline;
    this.svg.setAttribute("aria-label", `${this.figure.querySelector(".title").textContent}: ${headline}`);
    this.#draw();
  }

  #drawFrame() {
    const area = append(this.figure, "div", "area");
    this.top = append(area, "span", "top", "");
    this.svg = area.appendChild(element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" }));
    for (const y of [0, HEIGHT / 2, HEIGHT]) {
      this.svg.append(element("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y }));
    }
    for (const line of this.lines) {
      line.path = this.svg.appendChild(element("path", { class: `line line-${line.key}` }));
    }
  }

  #drawLegend(lines) {
    const legend = append(this.figure, "p", "legend");
    for (const { key, label } of lines) append(legend, "span", `key key-${key}`, label);
  }

  #draw() {
    const curves = this.lines.filter(({ key }) => key !== "dropped");
    const top = roundUp(1.05 * Math.max(...curves.map(({ series }) => series.max)));
    const { points, perPoint } = this.lines[0].series;
    const step = WIDTH / Math.max(points.length - 1, MIN_FRAMES / perPoint);
    this.top.textContent = top.toLocaleString("en");
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
