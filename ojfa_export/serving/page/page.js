// The page: what was chosen, and what the server gives for it.

import { Answer, agreementOf, markDifferences, markRest, percent, stepsOf, visible } from "./answer.js";
import { generate, isBroken, listModels } from "./server.js";

const LOOK_AGAIN = 1000; // ms, while the server loads
const at = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const radio = (name, value) => document.querySelector(`input[name=${name}][value=${value}]`);

let models = [];
let running = null; // ends what runs
let shown = []; // the answer, and the one at full depth
let drawing = false;

// --- Bundles and what may be chosen of them ---

const bundle = () => models.find((each) => each.id === at("bundle").value);

async function load() {
  tell("");
  try {
    models = await listModels(at("key").value);
  } catch (error) {
    if (error.code === "loading") {
      at("status").textContent = "The server is loading its bundles.";
      setTimeout(load, LOOK_AGAIN);
    } else {
      complain(error);
    }
    return;
  }
  const kept = at("bundle").value;
  at("bundle").replaceChildren(...models.map((each) => new Option(each.id, each.id)));
  if (models.some((each) => each.id === kept)) at("bundle").value = kept;
  at("status").textContent = "Ready.";
  showBundle();
}

/** Offers what the bundle can do, and begins where its server does. */
function showBundle() {
  const { blocks, exit, auto, chat, promise } = bundle().ojfa;
  at("blocks").max = blocks;
  // At full depth there would be nothing to see: three quarters of it show more.
  at("blocks").value = Number.isInteger(exit) ? exit : Math.max(1, Math.round(blocks * 0.75));
  allow("depth", "auto", auto);
  radio("depth", auto && !Number.isInteger(exit) ? "auto" : "fixed").checked = true;
  allow("kind", "chat", chat);
  if (!chat) radio("kind", "completion").checked = true;
  at("kind-note").textContent = chat ? "" : "This bundle has no chat template.";
  at("promise").textContent = wordsOf(promise);
  at("broken").hidden = true;
  showDepth();
  showLegend();
  lookForAlarm(bundle().id);
}

async function lookForAlarm(name) {
  const broken = await isBroken(name).catch(() => false);
  if (bundle()?.id === name) at("broken").hidden = !broken;
}

function allow(name, value, can) {
  radio(name, value).disabled = !can;
}

function wordsOf(promise) {
  if (promise === null) {
    return "Nothing about tokens that leave early: nobody has bounded how often they differ " +
      "from those of full depth.";
  }
  const { confidence, max_disagreement: most, domains, relative_cost: cost } = promise;
  return `With ${percent(confidence)} confidence at most ${percent(most)} of the tokens of ` +
    `“Auto” differ from those of full depth, on text like: ${domains.join(", ")}. ` +
    (cost < 1 ? `A token is expected to cost ${percent(cost)} of one at full depth.`
      : "It is kept by full depth: no exits save time within that.");
}

/** The exit of the bundle, or full depth, that is nearest to where the slider is. */
function exitOf() {
  const { blocks, exits } = bundle().ojfa;
  const value = Number(at("blocks").value);
  const nearer = (best, exit) => (Math.abs(exit - value) < Math.abs(best - value) ? exit : best);
  return exits.reduce(nearer, blocks);
}

function showDepth() {
  const { blocks, auto, drafts, promise } = bundle().ojfa;
  const run = exitOf();
  at("blocks-shown").textContent = `${run} of ${blocks}`;
  at("blocks").setAttribute("aria-valuetext", `${run} of ${blocks} blocks`);
  const notes = {
    fixed: "Every token leaves after so many blocks. Nothing is promised of that.",
    auto: promise === null
      ? "The bundle's policy chooses the exit of each token. Nothing is promised of that."
      : "The bundle's policy chooses the exit of each token, and keeps the promise.",
    speculate: `${drafts ? "The draft layer" : "An exit"} drafts tokens and all blocks check ` +
      "them: the tokens are those of full depth.",
  };
  const missing = auto ? "" : " Auto isn't there: the bundle has no policy.";
  at("depth-note").textContent = notes[chosen("depth")] + missing;
}

// --- Running ---

function bodyOf() {
  const body = { model: at("bundle").value, temperature: 0, max_tokens: Number(at("most").value) };
  const prompt = at("prompt").value;
  if (chosen("kind") === "chat") return { ...body, messages: [{ role: "user", content: prompt }] };
  return { ...body, prompt };
}

function depthOf() {
  const depth = chosen("depth");
  if (depth === "speculate") return { speculate: true };
  return { exit: depth === "auto" ? "auto" : exitOf() };
}

async function run(event) {
  event?.preventDefault();
  if (!bundle()) {
    await load();
    if (!bundle()) return;
  }
  running?.abort();
  const mine = new AbortController();
  running = mine;
  begin();
  try {
    await runBoth(mine.signal);
  } catch (error) {
    if (running === mine) failed(error);
  } finally {
    if (running === mine) end();
  }
}

/** The answer, and then, so that neither slows the other, the same at full depth. */
async function runBoth(signal) {
  const [body, depth, isChat, key] = [bodyOf(), depthOf(), chosen("kind") === "chat", at("key").value];
  const compares = at("compare").checked;
  const answer = new Answer(at("answer"), bundle().ojfa.blocks, isChat ? "" : body.prompt);
  shown = [answer];
  const reason = await fill(answer, isChat, { ...body, ...depth }, key, signal);
  if (!compares) {
    at("status").textContent = finished(answer, reason);
    return;
  }
  const full = new Answer(at("full"), answer.blocks, isChat ? "" : body.prompt);
  at("full-part").hidden = false;
  shown = [answer, full];
  await fill(full, isChat, { ...body, exit: "full" }, key, signal);
  markRest(answer, full);
  const words = agreementOf(answer, full);
  at("agreement").textContent = words.join(" ");
  at("status").textContent = `${finished(answer, reason)} ${words[0]}`;
}

async function fill(answer, isChat, body, key, signal) {
  let marked = 0;
  answer.changed = () => {
    answer.show();
    if (answer === shown[1]) marked = markDifferences(shown[0], answer, marked);
  };
  const reason = await generate(isChat, body, key, signal, (tokens, now) => {
    answer.take(tokens, now);
    drawSoon();
  });
  signal.throwIfAborted();
  draw();
  return reason;
}

function finished(answer, reason) {
  const ends = {
    end_of_text: "the text ended",
    max_new_tokens: "as many tokens as asked for",
    cache_full: "the longest text of the bundle",
    timeout: "the server's time was up",
  };
  const why = ends[reason] ? `, ${ends[reason]}` : "";
  return `The answer is finished${why}: ${answer.tokens.length} tokens, ${answer.early} left early.`;
}

function begin() {
  tell("");
  shown = [];
  at("status").textContent = "Running.";
  at("stop").disabled = false;
  at("agreement").textContent = "";
  at("token").textContent = "";
  at("full-part").hidden = true;
  at("full").replaceChildren();
  draw();
}

function end() {
  running = null;
  draw();
  showRows();
  if (document.activeElement === at("stop")) at("run").focus();
  at("stop").disabled = true;
}

function failed(error) {
  if (error.name === "AbortError") {
    at("status").textContent = "Stopped.";
    return;
  }
  at("status").textContent = "";
  complain(error);
}

function complain(error) {
  at("status").textContent = "";
  tell(error.message);
  at("alert").scrollIntoView({ block: "nearest" });
  if (error.status === 401) at("key").focus();
}

/** Says what went wrong; nothing takes it away. */
function tell(words) {
  at("alert").textContent = words;
}

// --- Showing ---

/** Draws at most once a frame, so that drawing costs the stream little. */
function drawSoon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(draw);
}

function draw() {
  drawing = false;
  for (const answer of shown) answer.changed?.();
  for (const cell of document.querySelectorAll("[data-figure]")) {
    const answer = shown[cell.cellIndex - 1];
    cell.textContent = answer ? answer.figures[cell.dataset.figure] : "–";
  }
  showLegend();
}

function showLegend() {
  if (!bundle()) return;
  const counts = shown[0]?.counts ?? new Map();
  const { blocks } = bundle().ojfa;
  const items = stepsOf(shown[0]?.blocks ?? blocks).map(([step, first, last]) => {
    const range = first === last ? `${first}` : `${first}–${last}`;
    return swatch(`step-${step}`, range, `: ${counts.get(step) ?? 0}`);
  });
  const drafted = shown[0]?.tokens.filter((token) => token.drafted).length;
  if (drafted) items.push(swatch("drafted", "drafted", `: ${drafted}`));
  if (shown.length > 1) items.push(swatch("differs", "differs", ""));
  at("legend").replaceChildren(...items);
}

function swatch(className, name, count) {
  const item = document.createElement("li");
  const sample = document.createElement("span");
  sample.className = `token ${className}`;
  sample.textContent = name;
  item.append(sample, count);
  return item;
}

function showRows() {
  if (!at("table-part").open || shown.length === 0) return;
  const [answer, full] = shown;
  const rows = answer.tokens.map((token, place) => {
    const there = full?.tokens[place];
    return row([
      place + 1,
      visible(token.text),
      `${token.blocks_run} of ${answer.blocks}`,
      token.confidence === null ? "" : percent(token.confidence),
      token.drafted ? "yes" : "no",
      full === undefined ? "" : there?.id === token.id ? "same" : there ? visible(there.text) : "none",
    ]);
  });
  at("rows").replaceChildren(...rows);
}

function row(cells) {
  const line = document.createElement("tr");
  for (const text of cells) line.insertCell().textContent = text;
  return line;
}

// --- Tokens one by one ---

function answerOf(box) {
  return shown.find((each) => each.box === box);
}

function pick(answer, place) {
  document.querySelector(".token.current")?.classList.remove("current");
  const span = answer.spans[place];
  span.classList.add("current");
  span.scrollIntoView({ block: "nearest" });
  at("token").textContent = answer.about(place);
}

function moveBy(event) {
  const answer = answerOf(event.currentTarget);
  const last = (answer?.spans.length ?? 0) - 1;
  if (last < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
  const current = event.currentTarget.querySelector(".token.current");
  const place = current ? Number(current.dataset.place) : -1;
  const to = { ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1,
    ArrowUp: place - 1, Home: 0, End: last }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  pick(answer, Math.min(Math.max(to, 0), last));
}

function pointAt(event) {
  const place = event.target.dataset?.place;
  const answer = answerOf(event.currentTarget);
  if (place !== undefined && answer) at("token").textContent = answer.about(Number(place));
}

// --- What the controls do ---

function listen() {
  at("ask").addEventListener("submit", run);
  at("stop").addEventListener("click", () => running?.abort());
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
  });
  at("bundle").addEventListener("change", showBundle);
  at("key").addEventListener("change", load);
  at("blocks").addEventListener("input", () => {
    radio("depth", "fixed").checked = true; // whoever moves it wants it
    if (bundle()) showDepth();
  });
  for (const each of document.querySelectorAll("input[name=depth]")) {
    each.addEventListener("change", () => bundle() && showDepth());
  }
  at("numbers").addEventListener("change", () => {
    document.body.classList.toggle("numbered", at("numbers").checked);
  });
  at("table-part").addEventListener("toggle", showRows);
  for (const box of [at("answer"), at("full")]) {
    box.addEventListener("keydown", moveBy);
    box.addEventListener("mouseover", pointAt);
  }
}

listen();
load();
