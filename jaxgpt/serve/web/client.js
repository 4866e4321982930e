// The service's interface as this page uses it. Addresses are relative: a proxy may serve the page under any path.

/** What went wrong, as a sentence for people. */
export class Failure extends Error {
  constructor(message, status = 0, field = "") {
    super(message);
    Object.assign(this, { status, field });
  }
}

const WORDS = {
  401: "This server wants an API key: enter yours in the settings.",
  403: "This API key may not do that.",
  404: "The server does not know that model.",
  413: "This conversation is larger than the server takes: start a new one, or delete turns.",
  429: "The server takes no more requests from you for now.",
  500: "The server failed at this request.",
  502: "The server behind the proxy does not answer.",
  503: "The server is busy or not ready yet.",
  504: "The server took too long.",
};
const UNREACHABLE = "The server cannot be reached: see whether it still runs and whether you are online.";
const CUT = "The connection ended before the answer did.";

async function call(path, key, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(UNREACHABLE);
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function failureOf(response) {
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? body?.message;
  const wait = Number(response.headers.get("Retry-After"));
  const sentence = capital(
    response.status === 401
      ? WORDS[401]
      : said || WORDS[response.status] || `The server answered ${response.status}.`,
  );
  return new Failure(
    wait ? `${sentence} Try again in ${wait} s.` : sentence,
    response.status,
    body?.error?.param,
  );
}

/** The names of the models that the server has. */
export async function models(key) {
  const { data } = await (await call("v1/models", key)).json();
  return data.map((model) => model.id);
}

/**
 * The pieces of an answer as they come: `{text, tokens, finish, usage, sources, citations}`, each part where there
 * is one. A request has `messages` to answer, or a `prompt` to go on from. A token is `{logprob, n, top: [[text, logprob], ...]}`: n is the number of characters that it is of the text.
 */
export async function* answer(request, key, signal) {
  const goesOn = "prompt" in request;
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const path = goesOn ? "v1/completions" : "v1/chat/completions";
  const response = await call(path, key, { method: "POST", body, signal });
  const tokensOf = aligner();
  let whole = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") break;
    const { error, choices, usage, sources } = JSON.parse(data);
    if (error) throw new Failure(capital(error.message ?? WORDS[500]));
    const { delta, text: more, logprobs, finish_reason: finish } = choices?.[0] ?? {};
    const text = (goesOn ? more : delta?.content) ?? "";
    whole ||= Boolean(finish);
    const tokens = tokensOf(text, goesOn ? contentOf(logprobs) : (logprobs?.content ?? []));
    yield { text, tokens, finish, usage, sources, citations: delta?.citations };
  }
  if (!whole) throw new Failure(CUT);
}

/** Tokens of a completion as those of a chat. */
function contentOf(logprobs) {
  return (logprobs?.tokens ?? []).map((token, i) => {
    const top = Object.entries(logprobs.top_logprobs?.[i] ?? {});
    const others = top.map(([other, logprob]) => ({ token: other, logprob }));
    return { token, logprob: logprobs.token_logprobs[i], top_logprobs: others };
  });
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Failure(CUT);
      });
      if (done) return;
      const lines = (held + value).split(/\r\n|\n/);
      held = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Tells how many characters of a growing text each token is, by the bytes that it stands for. A token may be a part
 * of a character, and text may come later than its tokens, or other than they say: then the last of them is all of it.
 */
function aligner() {
  const decoder = new TextDecoder();
  let [shown, spelled] = ["", ""];
  return (text, content) => {
    shown += text;
    const tokens = content.map(({ token, bytes, logprob, top_logprobs: top }) => {
      let part = bytes ? decoder.decode(new Uint8Array(bytes), { stream: true }) : token;
      if (!spelled && part[0] === " " && shown && shown[0] !== " ") part = part.slice(1); // an answer's first space
      spelled += part;
      return {
        logprob: rounded(logprob),
        n: part.length,
        top: (top ?? []).map((other) => [other.token, rounded(other.logprob)]),
      };
    });
    if (spelled.startsWith(shown)) return tokens;
    if (!tokens.length) tokens.push({ logprob: null, n: 0, top: [] });
    tokens.at(-1).n = Math.max(0, tokens.at(-1).n + shown.length - spelled.length);
    spelled = shown;
    return tokens;
  };
}

const rounded = (logprob) => Math.round(1e4 * logprob) / 1e4;
const capital = (sentence) => sentence.charAt(0).toUpperCase() + sentence.slice(1);
