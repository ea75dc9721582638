// What the page says about the served model, and the questions that it suggests.

import { address } from "./live_client.js";

/** Returns {name, reads, questions} of the model; an older server has nothing to say. */
export async function fetchModel() {
  const answer = await fetch(address("web/model.json")).catch(() => null);
  return answer?.ok ? answer.json() : null;
}

/**
 * Shows a model's name, what it reads, and a button for each question.
 * @param {object} ui the page's elements by id
 * @param {{name: string, reads: string, questions: string[]} | null} model
 * @param {(question: string) => void} onAsk is called with the question that is chosen
 */
export function showModel(ui, model, onAsk) {
  if (!model) return;
  ui["model-name"].textContent = model.name;
  ui["model-reads"].textContent = model.reads;
  ui.model.hidden = false;
  ui.suggestions.hidden = model.questions.length === 0;
  ui.suggestions.replaceChildren(...model.questions.map((question) => suggestion(question, onAsk)));
}

function suggestion(question, onAsk) {
  const button = document.createElement("button");
  Object.assign(button, { type: "button", textContent: question, ariaDisabled: "true" });
  button.addEventListener("click", () => onAsk(question));
  return button;
}
