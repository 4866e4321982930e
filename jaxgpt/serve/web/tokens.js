// What lies under an answer: each token's probability, and what might have stood in its place.

import { $, announce, h } from "./dom.js";

const LEVELS = [0.9, 0.6, 0.3, 0.1]; // probabilities above which a token is shaded less

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share > 0 && share < 0.1 ? "< 0.1 %" : `${share.toFixed(share > 99.9 || share < 10 ? 1 : 0)} %`;
};

/** A token's text so that its white space can be seen. */
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";

/** Writes text as one element a token: the `write` of `markdown.show`. */
export function writer(turn) {
  const ends = [];
  turn.tokens.forEach((token, i) => ends.push((ends[i - 1] ?? 0) + token.n));
  return (parent, text, at) => {
    for (let from = 0; from < text.length;) {
      const index = firstAbove(ends, at[from]);
      let to = from + 1;
      while (to < text.length && at[to] < (ends[index] ?? Infinity)) to += 1;
      const shown = text.slice(from, to);
      const known = turn.tokens[index]?.logprob != null;
      parent.append(
        known
          ? h("span", { class: `token p${level(turn.tokens[index])}`, "data-token": index }, shown)
          : shown,
      );
      from = to;
    }
  };
}

const level = ({ logprob }) => LEVELS.filter((least) => Math.exp(logprob) < least).length;

function firstAbove(ends, place) {
  let [low, high] = [0, ends.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    ends[middle] > place ? (high = middle) : (low = middle + 1);
  }
  return low;
}

/** The table that a token shows: what might have come and how likely each was. */
function card(turn, index) {
  const { logprob, n, top } = turn.tokens[index];
  const start = turn.tokens.slice(0, index).reduce((sum, token) => sum + token.n, 0);
  const own = turn.content.slice(start, start + n);
  const isOwn = ([text, p]) => text === own || p === logprob;
  const others = top.some(isOwn) ? top : [[own, logprob], ...top];
  const row = ([text, p]) => {
    const bar = h("i", { class: "share" });
    bar.style.setProperty("--share", Math.exp(p));
    return h(
      "tr",
      { class: isOwn([text, p]) ? "own" : null },
      h("td", {}, h("code", {}, visible(text))),
      h("td", {}, bar),
      h("td", {}, percent(p)),
    );
  };
  return [
    h("table", {}, h("tbody", {}, others.map(row))),
    h("p", {}, "Under the model itself, before temperature"),
  ];
}

let shown = null;

export function hide() {
  shown?.classList.remove("shown");
  shown = null;
  $("tip").hidden = true;
}

/** Shows a token's card beside it. */
function reveal(token, turn) {
  hide();
  shown = token;
  token.classList.add("shown");
  const tip = $("tip");
  tip.replaceChildren(...card(turn, Number(token.dataset.token)));
  tip.hidden = false;
  const [place, size] = [token.getClientRects()[0], tip.getBoundingClientRect()];
  const above = place.top - size.height - 6;
  tip.style.top = `${above > 8 ? above : place.bottom + 6}px`;
  tip.style.left = `${Math.max(8, Math.min(place.left - 12, innerWidth - size.width - 8))}px`;
}

/** Cards on hover and touch, and by the arrow keys where the answer has the focus. */
export function attach(body, turn) {
  body.addEventListener("pointerover", ({ target }) => {
    const token = target.closest(".token");
    token ? reveal(token, turn) : hide();
  });
  body.addEventListener("pointerleave", ({ pointerType }) => pointerType === "mouse" && hide());
  body.addEventListener("blur", hide);
  body.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.target !== body) return;
    event.preventDefault();
    const tokens = [...body.querySelectorAll(".token")];
    const next = tokens[Math.max(0, Math.min(tokens.indexOf(shown) + step, tokens.length - 1))];
    if (!next) return;
    next.scrollIntoView({ block: "nearest" });
    reveal(next, turn);
    announce(`${visible(next.textContent)}, ${percent(turn.tokens[next.dataset.token].logprob)}`);
  });
}
