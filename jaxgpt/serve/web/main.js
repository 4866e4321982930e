// The chat page: what its buttons do, and the answers that are under way.

import * as client from "./client.js";
import { $, announce, download, h, toast } from "./dom.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";
import * as thread from "./thread.js";
import * as tokens from "./tokens.js";

let all = store.load();
let current = store.fresh(store.recall("settings", {}));
/** Of each conversation that is being answered, what stops it. */
const running = new Map();

const panels = {
  conversations: sidebar.panel("conversations", true),
  settings: sidebar.panel("settings", false),
};
const isRunning = (conversation) => running.has(conversation.id);

function redraw() {
  const [stays, held] = [atEnd(), document.activeElement !== document.body];
  thread.render(current, isRunning(current), actions);
  if (held && document.activeElement === document.body) toPrompt();
  $("prompt").placeholder = current.turns.length ? "Reply" : "Ask anything";
  $("send").hidden = isRunning(current);
  $("halt").hidden = !isRunning(current);
  redrawList();
  $("heading").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} · jaxgpt` : "jaxgpt";
  if (stays) toEnd();
}

function redrawList() {
  sidebar.list(all, current.id, isRunning, { rename, remove });
}

/** Shows a conversation. */
function open(conversation) {
  current = conversation;
  settings.fill(conversation.settings);
  if ([...$("model").options].some(({ value }) => value === conversation.model))
    $("model").value = conversation.model;
  history.replaceState(null, "", `#${conversation.id}`);
  redraw();
  toEnd();
}

function startNew() {
  open(store.fresh(store.recall("settings", {})));
  panels.conversations.closeIfOver();
  toPrompt();
}

function keep(conversation) {
  if (!all.some((one) => one.id === conversation.id)) all = [conversation, ...all];
  all.sort((a, b) => b.changed - a.changed);
  if (!store.save(conversation))
    toast("This browser's store is full, so this is not kept: export and delete some.");
}

function rename(conversation, title) {
  if (title !== conversation.title) Object.assign(conversation, { title, named: true });
  keep(conversation);
  redraw();
}

function remove(conversation) {
  running.get(conversation.id)?.abort();
  all = all.filter((one) => one !== conversation);
  store.remove(conversation.id);
  conversation.id === current.id ? open(all[0] ?? store.fresh(store.recall("settings", {}))) : redraw();
  toast(`Deleted “${conversation.title}”.`, "Undo", () => {
    keep(conversation);
    open(conversation);
  });
}

/** Answers the turn `parent`, in a new turn or anew in the turn `index`; shows it as it comes. */
async function generate(conversation, parent, index = null) {
  const model = $("model").value;
  const turn = { role: "assistant", content: "", parent, model, tokens: [], stats: {} };
  if (index === null) index = store.add(conversation, turn);
  else conversation.turns[index] = turn;
  const control = new AbortController();
  Object.assign(conversation, { model });
  running.set(conversation.id, control);
  keep(conversation);
  redraw();
  toEnd();
  announce("Answering");
  const request = () => ({
    model,
    ...(conversation.settings.plain
      ? { prompt: store.text(conversation, parent) }
      : { messages: store.messages(conversation, parent) }),
    ...settings.asked(conversation.settings),
  });
  const receiveOne = () =>
    receive(client.answer(request(), settings.key(), control.signal), conversation, index);
  try {
    await receiveOne().catch((error) => {
      if (!settings.withoutProbabilities(error)) throw error;
      return receiveOne();
    });
  } catch (error) {
    if (error.name === "AbortError") turn.finish = "cancelled";
    else turn.error = { message: error.message, status: error.status ?? 0 };
  }
  running.delete(conversation.id);
  if (all.includes(conversation)) keep(conversation);
  if (conversation === current) redraw();
  else redrawList();
  announce(turn.error?.message ?? (turn.finish === "cancelled" ? "Stopped" : `Answer: ${turn.content}`));
}

/** Adds the pieces of an answer to its turn. */
async function receive(pieces, conversation, index) {
  const turn = conversation.turns[index];
  const begun = performance.now();
  let [first, last, saved, drawing] = [0, 0, begun, false];
  for await (const { text, tokens: more, finish, usage, sources, citations } of pieces) {
    const now = performance.now();
    turn.content += text;
    turn.tokens.push(...more);
    if (finish) turn.finish = finish;
    if (sources) turn.sources = sources;
    for (const { number } of citations ?? [])
      turn.sources?.filter((one) => one.number === number).forEach((one) => (one.cited = true));
    if (text) [first, last] = [first || now, now];
    const count = usage?.completion_tokens ?? turn.tokens.length;
    turn.stats = { tokens: count, first: first && (first - begun) / 1000, seconds: (last - first) / 1000 };
    if (now - saved > 2000 && store.save(conversation)) saved = now; // a page that is left keeps what has come
    if (drawing || conversation !== current) continue;
    drawing = true;
    requestAnimationFrame(() => {
      drawing = false;
      const stays = atEnd();
      if (conversation === current) thread.paint(conversation, index);
      if (stays) toEnd();
    });
  }
}

function ask(text) {
  if (!text.trim() || isRunning(current)) return;
  const last = store.path(current).at(-1) ?? -1;
  generate(current, store.add(current, { role: "user", content: text, parent: last }));
}

const actions = {
  redraw: () => redraw(),
  settings: () => (panels.settings.open(), $("key").focus()),
  plain(index) {
    $("plain").click();
    actions.retry(index);
  },
  retry: (index) => isRunning(current) || generate(current, current.turns[index].parent, index),
  again: (index) => isRunning(current) || generate(current, current.turns[index].parent),
  choose(index) {
    current.chosen[current.turns[index].parent] = index;
    keep(current);
    redraw();
  },
  change(index, text) {
    if (isRunning(current)) return;
    const { role, parent } = current.turns[index];
    const added = store.add(current, {
      role,
      content: text,
      parent,
      ...(role === "assistant" && { finish: "edited" }),
    });
    if (role === "user") generate(current, added);
    else (keep(current), redraw());
  },
};

/** Fills the choice of models, or says why there is none. */
async function loadModels() {
  $("notice").hidden = true;
  try {
    const names = await client.models(settings.key());
    $("model").replaceChildren(...names.map((name) => h("option", { value: name }, name)));
    if (names.includes(current.model)) $("model").value = current.model;
    $("model").disabled = false;
    $("welcome-model").textContent = $("model").value;
  } catch (error) {
    $("notice").hidden = false;
    $("notice-text").textContent = error.message;
    $("notice-key").hidden = error.status !== 401;
  }
}

const scroller = $("scroll");
const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
const toPrompt = () => (matchMedia("(pointer: coarse)").matches ? scroller : $("prompt")).focus(); // no keyboard springs up
const toEnd = () => (scroller.scrollTop = scroller.scrollHeight);

function composer() {
  const prompt = $("prompt");
  const submit = () => {
    if (isRunning(current) || !prompt.value.trim()) return;
    ask(prompt.value);
    prompt.value = "";
    prompt.focus();
  };
  if (!CSS.supports("field-sizing", "content")) {
    prompt.addEventListener("input", () => {
      prompt.style.height = "auto";
      prompt.style.height = `${prompt.scrollHeight}px`;
    });
  }
  $("composer").addEventListener("submit", (event) => (event.preventDefault(), submit()));
  $("halt").addEventListener("click", () => (running.get(current.id)?.abort(), prompt.focus()));
  prompt.addEventListener("keydown", (event) => {
    if (event.isComposing) return; // Enter chooses a character in an input method
    if (event.key === "Enter" && !event.shiftKey) (event.preventDefault(), submit());
    if (event.key === "ArrowUp" && !prompt.value) (event.preventDefault(), thread.editLast());
  });
}

function shortcuts() {
  addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, textarea, select");
    if (event.key === "Escape" && isRunning(current)) running.get(current.id).abort();
    if (event.key === "/" && !typing) (event.preventDefault(), $("prompt").focus());
    if (event.altKey && event.code === "KeyN") (event.preventDefault(), startNew());
  });
}

function files() {
  $("export").addEventListener("click", () => download("jaxgpt-conversations.json", store.exported(all)));
  $("import").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async ({ target }) => {
    try {
      const found = store.imported(await target.files[0].text());
      found.forEach(keep);
      open(found[0]);
      toast(`${found.length} ${found.length === 1 ? "conversation" : "conversations"} imported.`);
    } catch (error) {
      toast(error.message);
    }
    target.value = "";
  });
}

/** Opens the conversation that the address names. */
function fromAddress() {
  const named = all.find((one) => one.id === location.hash.slice(1));
  if (named && named !== current) open(named);
  return named;
}

function start() {
  settings.theme();
  settings.listen((chosen) => {
    current.settings = chosen;
    if (current.turns.length) store.save(current);
  }, loadModels);
  composer();
  shortcuts();
  files();
  $("new").addEventListener("click", startNew);
  $("model").addEventListener("change", () => ($("welcome-model").textContent = $("model").value));
  $("notice-again").addEventListener("click", loadModels);
  $("notice-key").addEventListener("click", actions.settings);
  $("list").addEventListener(
    "click",
    ({ target }) => target.closest("a") && panels.conversations.closeIfOver(),
  );
  for (const example of document.querySelectorAll("#welcome button"))
    example.addEventListener("click", () => ask(example.textContent));
  addEventListener("hashchange", fromAddress);
  addEventListener("storage", ({ key }) => {
    if (!store.isConversation(key)) return; // of another tab, from here on
    const answered = new Map(all.filter(isRunning).map((one) => [one.id, one]));
    all = store.load().map((one) => answered.get(one.id) ?? one);
    current = all.find(({ id }) => id === current.id) ?? current;
    if (key.endsWith(current.id) && !isRunning(current)) redraw();
    else redrawList();
  });
  addEventListener("pagehide", () => running.size && all.filter(isRunning).forEach(store.save));
  scroller.addEventListener("scroll", () => ($("to-end").hidden = atEnd()));
  $("to-end").addEventListener("click", toEnd);
  addEventListener("pointerdown", ({ target }) => target.closest(".token") || tokens.hide());
  addEventListener("wheel", tokens.hide, { passive: true });
  addEventListener("touchmove", tokens.hide, { passive: true });
  fromAddress() ?? open(current);
  loadModels();
  toPrompt();
}

start();
