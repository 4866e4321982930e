// Conversations, kept in this browser alone: one entry each, so that two tabs do not overwrite each other's.
// A conversation is a tree of turns: an edit or a second answer is a sibling, and nothing that was said is lost.

const PREFIX = "jaxgpt.conversation.";
const LONGEST_TITLE = 60;

/**
 * @typedef {{role: "user"|"assistant", content: string, parent: number, tokens?: object[], model?: string,
 *   finish?: string, sources?: object[], error?: {message: string, status: number}, stats?: object}} Turn
 * `parent` is the index of the turn before, -1 at the start.
 * @typedef {{id: string, title: string, named: boolean, changed: number, settings: object, turns: Turn[],
 *   chosen: Object<number, number>}} Conversation
 * `chosen` has, of a turn with several that follow, the index of the one that is shown.
 */

export function fresh(settings) {
  const id = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`;
  return {
    id,
    title: "",
    named: false,
    changed: Date.now(),
    settings: { ...settings },
    turns: [],
    chosen: {},
  };
}

/** Indices of the turns that follow a turn. */
export function following(conversation, parent) {
  return conversation.turns.flatMap((turn, i) => (turn.parent === parent ? [i] : []));
}

/** Indices of the turns that are shown, from the first on. */
export function path(conversation) {
  const shown = [];
  for (let at = -1; ; shown.push(at)) {
    const next = following(conversation, at);
    if (!next.length) return shown;
    at = next.includes(conversation.chosen[at]) ? conversation.chosen[at] : next.at(-1);
  }
}

/** Adds a turn behind another and shows it; its index. */
export function add(conversation, turn) {
  const index = conversation.turns.push(turn) - 1;
  conversation.chosen[turn.parent] = index;
  conversation.changed = Date.now();
  if (!conversation.named && !conversation.title && turn.role === "user")
    conversation.title = titleOf(turn.content);
  return index;
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > LONGEST_TITLE ? `${line.slice(0, LONGEST_TITLE - 1).trimEnd()}…` : line;
}

function upTo(conversation, last) {
  const said = [];
  for (let i = last; i >= 0; i = conversation.turns[i].parent) said.unshift(conversation.turns[i]);
  return said;
}

/** The text up to a turn, each turn as it stands. */
export function text(conversation, last) {
  return upTo(conversation, last)
    .map(({ content }) => content)
    .join("");
}

/** Messages for the service up to a turn, the system prompt first. */
export function messages(conversation, last) {
  const { system } = conversation.settings;
  const turns = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of upTo(conversation, last)) {
    if (turns.at(-1)?.role === role)
      turns.at(-1).content += `\n\n${content}`; // after a turn without an answer
    else if (content) turns.push({ role, content });
  }
  return turns;
}

/** All that are kept, the last changed first. */
export function load() {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  const found = keys.map((key) => checked(parsed(localStorage.getItem(key)))).filter(Boolean);
  return found.sort((a, b) => b.changed - a.changed);
}

export function get(id) {
  return checked(parsed(localStorage.getItem(PREFIX + id)));
}

export function isConversation(key) {
  return key?.startsWith(PREFIX);
}

/** Keeps a conversation; where the browser's store is full, without its tokens. Whether it could. */
export function save(conversation) {
  const slim = { ...conversation, turns: conversation.turns.map((turn) => ({ ...turn, tokens: undefined })) };
  for (const version of [conversation, slim]) {
    try {
      localStorage.setItem(PREFIX + conversation.id, JSON.stringify(version));
      return true;
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
    }
  }
  return false;
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
}

/** The conversations of an exported file, under new names where this browser has others of these. */
export function imported(text) {
  const file = parsed(text);
  const all = Array.isArray(file?.conversations) ? file.conversations.map(checked) : [];
  if (!all.length || all.includes(null))
    throw new Error("This file holds no conversations exported from this page.");
  return all.map((one) => (get(one.id) ? { ...one, id: fresh().id } : one));
}

export function exported(conversations) {
  return { format: "jaxgpt conversations", version: 1, conversations };
}

/** A remembered choice of the user's, such as a theme. */
export function recall(name, otherwise) {
  return parsed(localStorage.getItem(`jaxgpt.${name}`)) ?? otherwise;
}

export function remember(name, value) {
  try {
    localStorage.setItem(`jaxgpt.${name}`, JSON.stringify(value));
  } catch {
    // A full store: the choice holds until the page is left.
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** A value as a conversation, or null where it is none. */
function checked(value) {
  const isTurn = (turn, i) =>
    ["user", "assistant"].includes(turn?.role) &&
    typeof turn.content === "string" &&
    Number.isInteger(turn.parent) &&
    turn.parent >= -1 &&
    turn.parent < i;
  if (typeof value?.id !== "string" || !Array.isArray(value.turns) || !value.turns.every(isTurn)) return null;
  const title = typeof value.title === "string" ? value.title : "";
  const whole = (token) => Number.isInteger(token?.n) && Array.isArray(token.top);
  const list = (given, holds) => (Array.isArray(given) && given.every(holds) ? given : undefined);
  const turns = value.turns.map((turn) => ({
    ...turn,
    tokens: list(turn.tokens, whole),
    sources: list(turn.sources, Boolean),
  }));
  const objects = { settings: { ...value.settings }, chosen: { ...value.chosen }, turns };
  return { ...value, ...objects, title, named: Boolean(value.named), changed: Number(value.changed) || 0 };
}
