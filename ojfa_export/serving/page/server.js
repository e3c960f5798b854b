// What the page asks of the server, and when the tokens came.

/** A refusal in the server's own words. */
export class ServerError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The bundles that are served. */
export async function listModels(key) {
  const answer = await send("v1/models", { headers: headersOf(key) });
  return (await answer.json()).data;
}

/** Whether the server has seen the promise of a bundle broken. */
export async function isBroken(name) {
  // While it loads the status is 503, with the same fields.
  const health = await (await fetch("health")).json();
  return Boolean(health.models?.[name]?.promise_alarm);
}

/**
 * Generates, and hands over tokens as they come.
 *
 * @param {boolean} isChat Which of the two paths to ask.
 * @param {object} body Of the request; what makes it a stream is added.
 * @param {string} key Of the server; empty for none.
 * @param {AbortSignal} signal Ends it: the server cancels the request of a client that leaves.
 * @param {(tokens: object[], now: number) => void} onTokens Gets those that came together.
 * @returns {Promise<string|null>} Why it ended, in the engine's words.
 */
export async function generate(isChat, body, key, signal, onTokens) {
  const answer = await send(isChat ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: { ...headersOf(key), "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, token_details: true }),
    signal,
  });
  let reason = null;
  for await (const events of eventsOf(answer.body)) {
    const now = performance.now();
    const choices = events.flatMap((event) => choicesOf(event));
    reason = choices.reduce((last, choice) => choice.finish_detail ?? last, reason);
    const tokens = choices.flatMap((choice) => tokensOf(choice));
    if (tokens.length > 0) onTokens(tokens, now);
  }
  return reason;
}

function headersOf(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function send(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server can't be reached.", "unreachable");
  }
  if (!answer.ok) throw await errorOf(answer);
  return answer;
}

async function errorOf(answer) {
  const body = await answer.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered with status ${answer.status}.`;
  return new ServerError(answer.status, message, body?.error?.code);
}

function choicesOf(event) {
  // A stream has begun with status 200 when its request fails.
  if (event.error) throw new ServerError(200, event.error.message, event.error.code);
  return event.choices;
}

/** The tokens of a chunk; text that no token brought belongs to the last of them. */
function tokensOf(choice) {
  const tokens = choice.tokens ?? [];
  const text = choice.delta ? (choice.delta.content ?? "") : (choice.text ?? "");
  const rest = text.slice(tokens.reduce((sum, token) => sum + token.text.length, 0));
  if (!rest) return tokens;
  if (tokens.length === 0) return [{ text: rest, trailing: true }];
  const last = tokens[tokens.length - 1];
  return [...tokens.slice(0, -1), { ...last, text: last.text + rest }];
}

function brokenOff(error) {
  if (error.name === "AbortError") throw error;
  throw new ServerError(0, "The connection to the server broke off.", "broken off");
}

/** The events of a stream, each time as many as had come. */
async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch(brokenOff);
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    // Lines that begin with a colon keep the connection awake and say nothing.
    const data = parts.filter((part) => part.startsWith("data: ")).map((part) => part.slice(6));
    yield data.filter((each) => each !== "[DONE]").map((each) => JSON.parse(each));
  }
}
