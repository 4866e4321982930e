// The turns of a conversation as they are shown.

import { $, copyButton, h, icon, iconButton } from "./dom.js";
import { show } from "./markdown.js";
import { following, path } from "./store.js";
import * as tokens from "./tokens.js";

const ENDS = {
  edited: "Edited",
  interrupted: "Interrupted",
  length: "Cut off at the limit of tokens",
  cancelled: "Stopped",
  content_filter: "Held back by the server's filter",
};
const shaded = new WeakSet();
const drawn = new WeakMap(); // turn -> its element, and what that shows
const bodies = new WeakMap();

/**
 * Shows a conversation; turns that have not changed stay as they are, with what is selected in them.
 * @param {{send: Function, again: Function, retry: Function, change: Function, choose: Function, settings: Function}}
 *   actions of the turns, each with the index of one.
 */
export function render(conversation, isRunning, actions) {
  tokens.hide();
  const focus = focused();
  const shown = path(conversation);
  const elements = shown.map((index, i) => {
    return elementOf(conversation, index, isRunning && i === shown.length - 1, actions);
  });
  const thread = $("thread");
  elements.forEach((element, i) => {
    if (!thread.children[i]) thread.append(element);
    else if (thread.children[i] !== element) thread.children[i].replaceWith(element);
  });
  while (thread.children.length > elements.length) thread.lastElementChild.remove();
  $("welcome").hidden = shown.length > 0;
  const active = document.activeElement === document.body;
  if (focus && active) elements[focus.place]?.querySelector(`[aria-label="${focus.label}"]:enabled`)?.focus();
}

function elementOf(conversation, index, isRunning, actions) {
  const turn = conversation.turns[index];
  const { content, finish, error, parent } = turn;
  const key = JSON.stringify([
    isRunning,
    content.length,
    finish,
    error,
    index,
    following(conversation, parent),
  ]);
  if (drawn.get(turn)?.key !== key) {
    drawn.set(turn, { key, element: turnElement(conversation, index, isRunning, actions) });
  }
  return drawn.get(turn).element;
}

/** Which turn's button has the focus, by its place and label. */
function focused() {
  const turn = document.activeElement.closest(".turn");
  return (
    turn && {
      place: [...$("thread").children].indexOf(turn),
      label: document.activeElement.getAttribute("aria-label"),
    }
  );
}

/** Shows what has come to an answer since. */
export function paint(conversation, index) {
  const body = bodies.get(conversation.turns[index]);
  if (body) show(body, conversation.turns[index].content, tokens.writer(conversation.turns[index]));
}

function turnElement(conversation, index, isRunning, actions) {
  const turn = conversation.turns[index];
  const element = h("article", {
    class: `turn ${turn.role}`,
    "data-turn": index,
    "aria-label": turn.role === "user" ? "You" : turn.model || "Answer",
  });
  const answer = turn.role === "assistant";
  if (answer) element.append(h("h2", { class: "name" }, icon("spark"), turn.model || "Answer"));
  const body = answer ? answerBody(turn, isRunning) : h("div", { class: "body" }, turn.content);
  if (turn.content || isRunning) element.append(body);
  if (turn.sources?.length) element.append(sourceList(turn.sources));
  if (turn.error) element.append(errorBox(turn.error, index, actions));
  if (!isRunning) element.append(bar(conversation, index, element, body, actions));
  return element;
}

function answerBody(turn, isRunning) {
  const body = h("div", { class: `body text ${isRunning ? "running" : ""}` });
  turn.tokens ??= [];
  if (!turn.tokens.length && turn.content) turn.tokens = [{ logprob: null, n: turn.content.length, top: [] }];
  show(body, turn.content, tokens.writer(turn));
  tokens.attach(body, turn);
  shade(body, turn);
  bodies.set(turn, body);
  return body;
}

/** Colours an answer by its tokens' probabilities, and makes it a place to walk through them, or neither. */
function shade(body, turn) {
  const on = shaded.has(turn);
  body.classList.toggle("shaded", on);
  const attributes = {
    tabindex: "0",
    role: "group",
    "aria-label": "Tokens: left and right arrow keys go through them",
  };
  for (const [name, value] of Object.entries(attributes))
    on ? body.setAttribute(name, value) : body.removeAttribute(name);
}

function errorBox({ message, status }, index, actions) {
  const again = h(
    "button",
    { type: "button", class: "again", click: () => actions.retry(index) },
    icon("again"),
    "Try again",
  );
  const key = status === 401 && h("button", { type: "button", click: actions.settings }, "Enter a key");
  if (message.includes("no chat template")) {
    const goOn = h("button", { type: "button", click: () => actions.plain(index) }, "Go on from the text");
    return h("div", { class: "error", role: "alert" }, icon("warning"), h("p", {}, message), goOn);
  }
  return h("div", { class: "error", role: "alert" }, icon("warning"), h("p", {}, message), key, again);
}

/** What an answer rests on, by the numbers that it cites: names, with their passages to unfold. */
function sourceList(sources) {
  const item = ({ number, title, source, text, cited }) => {
    const name = [title, source].filter(Boolean).join(" · ") || "A source";
    const shown = text ? h("details", {}, h("summary", {}, name), h("p", {}, String(text))) : name;
    return h("li", { value: Number(number) || null, class: cited && "cited" }, shown);
  };
  return h("section", { class: "sources" }, h("b", {}, "Sources"), h("ol", {}, sources.map(item)));
}

function bar(conversation, index, element, body, actions) {
  const turn = conversation.turns[index];
  const edit = iconButton("Edit", "edit", () =>
    editor(element, turn, (text) => actions.change(index, text), actions.redraw),
  );
  const parts = [versions(conversation, index, actions)];
  if (turn.content)
    parts.push(
      copyButton(() => turn.content),
      edit,
    );
  if (turn.role === "assistant" && !(turn.error && !turn.content)) {
    parts.push(iconButton("Answer again", "again", () => actions.again(index)));
    if (turn.tokens?.some((token) => token.logprob != null)) parts.push(shadeButton(body, turn));
    parts.push(
      h(
        "span",
        { class: "stats" },
        [ENDS[turn.finish ?? "interrupted"], ...figures(turn.stats)].filter(Boolean).join(" · "),
      ),
    );
  }
  return h("div", { class: "bar" }, parts);
}

function shadeButton(body, turn) {
  return iconButton(
    "Token probabilities",
    "bars",
    ({ currentTarget }) => {
      shaded.has(turn) ? shaded.delete(turn) : shaded.add(turn);
      currentTarget.setAttribute("aria-pressed", shaded.has(turn));
      shade(body, turn);
      if (shaded.has(turn)) body.focus({ preventScroll: true });
    },
    { "aria-pressed": String(shaded.has(turn)) },
  );
}

function figures({ tokens: count, first, seconds } = {}) {
  if (!count) return [];
  const speed = count > 1 && seconds > 0 && `${((count - 1) / seconds).toFixed(1)} tokens/s`;
  return [
    `${count} ${count === 1 ? "token" : "tokens"}`,
    speed,
    first != null && `first after ${first.toFixed(2)} s`,
  ].filter(Boolean);
}

/** Which of several siblings this is, with a way to each. */
function versions(conversation, index, { choose }) {
  const all = following(conversation, conversation.turns[index].parent);
  if (all.length < 2) return null;
  const at = all.indexOf(index);
  const to = (step, label, name) =>
    iconButton(label, name, () => choose(all[at + step]), { disabled: all[at + step] === undefined });
  const count = h("span", {}, `${at + 1} / ${all.length}`);
  return h(
    "span",
    { class: "versions", role: "group", "aria-label": "Versions" },
    to(-1, "Version before", "left"),
    count,
    to(1, "Next version", "right"),
  );
}

/** Puts a field in place of a turn. */
function editor(element, turn, done, cancel) {
  const field = h("textarea", { "aria-label": "Text of this turn", rows: "2" });
  field.value = turn.content;
  const asksAgain = () => turn.role === "user" || field.value !== turn.content;
  const finish = () => (field.value.trim() && asksAgain() ? done(field.value) : cancel());
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") event.stopPropagation();
    if (event.key === "Escape") cancel();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) finish();
  });
  const save = h("button", { type: "submit", class: "primary" }, turn.role === "user" ? "Send" : "Save");
  const form = h("form", { class: "editor", submit: (event) => (event.preventDefault(), finish()) }, field);
  form.append(h("div", {}, h("button", { type: "button", click: cancel }, "Cancel"), save));
  drawn.delete(turn);
  element.replaceChildren(form);
  field.focus();
}

/** Opens the last question for an edit, if there is one. */
export function editLast() {
  [...document.querySelectorAll(".turn.user")].at(-1)?.querySelector('[aria-label="Edit"]')?.click();
}
