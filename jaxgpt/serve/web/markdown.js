// The part of Markdown that models write, as elements. No text becomes markup, no address but http(s) a link.
// Every character keeps its place in the source, so that tokens can be found under what is shown.

import { copyButton, h } from "./dom.js";

const DEEPEST = 6; // quotes and lists in each other; what is deeper stays as it is written
const LONGEST = 1000; // characters of emphasis: thousands of marks that never close must not take minutes
const FENCE = /^ {0,3}(`{3,}|~{3,}) *([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6}) +(?=\S)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const THOUGHT = /^ *<think> */;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const DIVIDER = /^ *\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?$/;
const MARKS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const SPECIAL = /[\\`*_~[]|https?:\/\//g;
const LINK = /\[([^\]\n]+)\]\((https?:\/\/(?:[^\s()<>"]|\([^\s()<>"]*\))+)\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`*)\]]*[^\s<>"'`*)\].,;:!?]/y;

/** Text, and where in the whole source each of its characters stands. */
class Source {
  constructor(text, at) {
    Object.assign(this, { text, at });
  }

  slice(from, to) {
    return new Source(this.text.slice(from, to), this.at.slice(from, to));
  }

  lines() {
    let from = 0;
    return this.text.split("\n").map((line) => this.slice(from, (from += line.length + 1) - 1));
  }

  static join(lines) {
    const text = lines.map((line) => line.text).join("\n");
    const at = lines.flatMap((line, i) =>
      i ? [(lines[i - 1].at.at(-1) ?? line.at[0] ?? 0) + 1, ...line.at] : line.at,
    );
    return new Source(text, at);
  }
}

/**
 * Shows a text in an element, and leaves blocks alone that are there already: a growing answer costs its last one.
 * @param {(parent: Element, text: string, at: number[]) => void} write puts text under an element.
 */
export function show(element, text, write = (parent, shown) => parent.append(shown)) {
  const source = new Source(
    text,
    Array.from({ length: text.length }, (_, i) => i),
  );
  const found = blocks(source.lines(), 0);
  found.forEach((block, i) => {
    const key = `${block.kind}\n${Source.join(block.lines).text}`;
    const old = element.children[i];
    if (old?.source === key) return;
    const fresh = draw(block, 0, write);
    fresh.source = key;
    old ? old.replaceWith(fresh) : element.append(fresh);
  });
  while (element.children.length > found.length) element.lastElementChild.remove();
}

/** Lines as blocks: each a kind, its lines, and their number. */
function blocks(lines, depth) {
  const found = [];
  for (let i = 0; i < lines.length;) {
    if (!lines[i].text.trim()) {
      i += 1;
      continue;
    }
    const kind = kindOf(lines, i, depth);
    const length = LENGTHS[kind](lines, i, depth);
    found.push({ kind, lines: lines.slice(i, i + length) });
    i += length;
  }
  return found;
}

function kindOf(lines, i, depth) {
  const { text } = lines[i];
  if (depth === 0 && THOUGHT.test(text)) return "thought";
  if (FENCE.test(text)) return "fence";
  if (HEADING.test(text)) return "heading";
  if (RULE.test(text)) return "rule";
  if (depth < DEEPEST && QUOTE.test(text)) return "quote";
  if (depth < DEEPEST && ITEM.test(text)) return "list";
  return text.includes("|") && DIVIDER.test(lines[i + 1]?.text ?? "") ? "table" : "paragraph";
}

/** The number of lines from i on for which a condition of the line and its index holds. */
function run(lines, i, holds) {
  let end = i + 1;
  while (end < lines.length && holds(lines[end].text, end)) end += 1;
  return end - i;
}

const LENGTHS = {
  thought(lines, i) {
    const end = lines.findIndex(({ text }, at) => at >= i && endOf(text) >= 0);
    return (end < 0 ? lines.length : end + 1) - i;
  },
  fence(lines, i) {
    const mark = FENCE.exec(lines[i].text)[1];
    const open = run(lines, i, (text) => !closes(text, mark));
    return Math.min(open + 1, lines.length - i);
  },
  heading: () => 1,
  rule: () => 1,
  quote: (lines, i) => run(lines, i, (text) => QUOTE.test(text)),
  list(lines, i) {
    const ordered = (text) => /\d/.test(ITEM.exec(text)?.[2] ?? "");
    const same = (text) => ITEM.test(text) && !RULE.test(text) && ordered(text) === ordered(lines[i].text);
    const goesOn = (text) => same(text) || /^ {2,}\S/.test(text);
    return run(lines, i, (text, at) => goesOn(text) || (!text.trim() && goesOn(lines[at + 1]?.text ?? "")));
  },
  table: (lines, i) => run(lines, i, (text) => text.includes("|")),
  paragraph: (lines, i, depth) =>
    run(lines, i, (text, at) => text.trim() && kindOf(lines, at, depth) === "paragraph"),
};

function draw({ kind, lines }, depth, write) {
  return DRAWINGS[kind](lines, depth, write);
}

const DRAWINGS = {
  thought(lines, depth, write) {
    const end = endOf(lines.at(-1).text);
    const [first, ...rest] = [...lines.slice(0, -1), end < 0 ? lines.at(-1) : lines.at(-1).slice(0, end)];
    const inner = [first.slice(THOUGHT.exec(first.text)[0].length), ...rest];
    const fold = h("details", { class: "thought", open: end < 0 }, h("summary", {}, "Thoughts"));
    return nested(fold, inner, depth, write);
  },
  fence(lines, _, write) {
    const [, mark, language] = FENCE.exec(lines[0].text);
    const closed = lines.length > 1 && closes(lines.at(-1).text, mark);
    const code = h("code");
    const body = Source.join(lines.slice(1, closed ? -1 : undefined));
    write(code, body.text, body.at);
    const head = h(
      "header",
      {},
      h("span", {}, language || "text"),
      copyButton(() => body.text, "Copy the code"),
    );
    return h("div", { class: "code" }, head, h("pre", { tabindex: "0" }, code));
  },
  heading([line], _, write) {
    const mark = HEADING.exec(line.text)[0];
    return inline(h(`h${Math.min(mark.trim().length + 2, 6)}`), line.slice(mark.length), write);
  },
  rule: () => h("hr"),
  quote(lines, depth, write) {
    const inner = lines.map((line) => line.slice(QUOTE.exec(line.text)[0].length));
    return nested(h("blockquote"), inner, depth, write);
  },
  list(lines, depth, write) {
    const [, indent, mark] = ITEM.exec(lines[0].text);
    const items = [];
    for (const line of lines) {
      const item = ITEM.exec(line.text);
      if (item && item[1].length <= indent.length + 1) items.push([line.slice(item[0].length)]);
      else items.at(-1).push(line.slice(Math.min(indentOf(line), indent.length + mark.length + 1)));
    }
    const list = /\d/.test(mark) ? h("ol", { start: parseInt(mark, 10) }) : h("ul");
    list.append(...items.map((item) => nested(h("li"), item, depth, write)));
    return list;
  },
  table(lines, _, write) {
    const cells = (line, tag) => cellsOf(line).map((cell) => inline(h(tag), cell, write));
    const body = lines.slice(2).map((line) => h("tr", {}, cells(line, "td")));
    return h(
      "div",
      { class: "table", tabindex: "0" },
      h("table", {}, h("thead", {}, h("tr", {}, cells(lines[0], "th"))), h("tbody", {}, body)),
    );
  },
  paragraph: (lines, _, write) => inline(h("p"), Source.join(lines), write),
};

const endOf = (text) => text.search(/<\/think>\s*$/);
const closes = (text, mark) => text.trim().startsWith(mark) && !text.trim().replaceAll(mark[0], "");
const indentOf = (line) => /^ */.exec(line.text)[0].length;

function nested(parent, lines, depth, write) {
  parent.append(...blocks(lines, depth + 1).map((block) => draw(block, depth + 1, write)));
  return parent;
}

function cellsOf(line) {
  const cells = [];
  let from = /^ *\|?/.exec(line.text)[0].length;
  for (let i = from; i <= line.text.length; i += 1) {
    const ends =
      i === line.text.length
        ? line.text.slice(from).trim()
        : line.text[i] === "|" && line.text[i - 1] !== "\\";
    if (!ends) continue;
    const cell = line.slice(from, i);
    const start = cell.text.length - cell.text.trimStart().length;
    cells.push(cell.slice(start, start + cell.text.trim().length));
    from = i + 1;
  }
  return cells;
}

/** Emphasis, code and links of a text, under an element. */
function inline(parent, source, write) {
  const { text } = source;
  let done = 0;
  const plain = (to) => to > done && write(parent, text.slice(done, to), source.at.slice(done, to));
  for (const { index } of text.matchAll(SPECIAL)) {
    if (index < done) continue;
    const span = escaped(text, index) ?? code(text, index) ?? link(text, index) ?? emphasis(text, index);
    if (!span) continue;
    plain(index);
    const inner = source.slice(span.from, span.to);
    const element = span.element ?? parent;
    span.verbatim ? write(element, inner.text, inner.at) : inline(element, inner, write);
    if (span.element) parent.append(span.element);
    done = span.end;
  }
  plain(text.length);
  return parent;
}

function escaped(text, i) {
  if (text[i] !== "\\" || !/[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) return null;
  return { from: i + 1, to: i + 2, end: i + 2, verbatim: true };
}

function code(text, i) {
  if (text[i] !== "`") return null;
  const mark = /`+/y;
  mark.lastIndex = i;
  const [ticks] = mark.exec(text);
  const from = i + ticks.length;
  const to = text.indexOf(ticks, from);
  return to > from ? { element: h("code"), from, to, end: to + ticks.length, verbatim: true } : null;
}

function link(text, i) {
  LINK.lastIndex = ADDRESS.lastIndex = i;
  const [, label, target] = LINK.exec(text) ?? [];
  const address = target ?? ADDRESS.exec(text)?.[0];
  if (!address) return null;
  const element = h("a", { href: address, target: "_blank", rel: "noopener noreferrer" });
  if (!target) return { element, from: i, to: i + address.length, end: i + address.length, verbatim: true };
  return { element, from: i + 1, to: i + 1 + label.length, end: LINK.lastIndex };
}

function emphasis(text, i) {
  const inWord = (at) => /[\p{L}\p{N}]/u.test(text[at] ?? "");
  for (const [mark, tag] of MARKS) {
    const from = i + mark.length;
    if (!text.startsWith(mark, i) || !/\S/.test(text[from] ?? "") || (mark[0] === "_" && inWord(i - 1)))
      continue;
    for (
      let to = text.indexOf(mark, from + 1);
      to > 0 && to < from + LONGEST;
      to = text.indexOf(mark, to + 1)
    ) {
      const end = to + mark.length;
      const doubled = mark.length === 1 && (text[end] === mark || text[to - 1] === mark);
      if (/\s/.test(text[to - 1]) || doubled || (mark[0] === "_" && inWord(end))) continue;
      return { element: h(tag), from, to, end };
    }
  }
  return null;
}
