"use strict";
// A look is {prompt: [text], answer: [text], selected: [[[place]]]}: of each token of the answer, by layer, the places of
// the tokens that were seen when it was chosen.
const find = (id) => document.getElementById(id);
const data = JSON.parse(find("data").textContent);
const slider = find("layer");
let shown = null; // [view, index]: the token that is pointed at
let messages = [];

// A short name of a token, on which people and screen readers agree.
const name = (text) => "“" + (text.trim() || text).replaceAll("\n", "⏎") + "”";

function make(kind, parent, content = "", className = "") {
  const made = document.createElement(kind);
  made.textContent = content;
  if (className) made.className = className;
  parent.append(made);
  return made;
}

// Prompt and answer as tokens. The answer is a list box: one stop of the Tab key, arrows inside.
function showLook(look, parent, number) {
  const view = {look, spans: [], lit: []};
  make("h2", parent, "What the model read");
  view.strip = make("canvas", parent, "", "overview");
  view.strip.setAttribute("aria-hidden", "true"); // the line of text says the same
  view.strip.addEventListener("click", (event) => {
    const place = Math.floor((event.offsetX / view.strip.clientWidth) * look.prompt.length);
    show(view, Math.min(place, look.prompt.length - 1));
  });
  const prompt = make("div", parent, "", "text prompt");
  prompt.tabIndex = 0;
  prompt.setAttribute("role", "region");
  prompt.setAttribute("aria-label", "What the model read, " + number);
  look.prompt.forEach((text) => view.spans.push(make("span", prompt, text)));
  make("h2", parent, "What it answered");
  const answer = make("div", parent, "", "text answer");
  answer.tabIndex = 0;
  answer.setAttribute("role", "listbox");
  answer.setAttribute("aria-label", "Tokens of answer " + number);
  look.answer.forEach((text, i) => {
    const span = make("span", answer, text);
    span.id = "token-" + number + "-" + i;
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.setAttribute("aria-label", name(text));
    span.addEventListener("pointerenter", () => point(view, i));
    span.addEventListener("click", () => point(view, i, true));
    view.spans.push(span);
  });
  view.answer = answer;
  view.prompt = prompt;
  answer.addEventListener("focus", () => {
    if (!shown || shown[0] !== view) point(view, 0);
  });
  answer.addEventListener("keydown", (event) => {
    const last = look.answer.length - 1;
    const now = shown && shown[0] === view ? shown[1] : 0;
    const to = {ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: last};
    if (!(event.key in to)) return;
    event.preventDefault();
    point(view, Math.max(0, Math.min(last, to[event.key])), true);
  });
  const layers = look.selected.length ? look.selected[0].length : 0;
  slider.max = layers;
  slider.disabled = !layers;
  return view;
}

// Light up what the layers saw when a token was chosen; with `moves`, scroll a long prompt to what most of them saw.
function point(view, index, moves = false) {
  if (shown) clear(shown[0]);
  shown = [view, index];
  const {look, spans, answer} = view;
  const layers = look.selected[index] || [];
  const layer = Math.min(Number(slider.value), layers.length);
  const counts = new Map();
  (layer ? [layers[layer - 1]] : layers).forEach((places) =>
    places.forEach((place) => counts.set(place, (counts.get(place) || 0) + 1)));
  const most = layer ? 1 : layers.length;
  counts.forEach((count, place) => {
    view.lit.push(spans[place]);
    spans[place].classList.add("lit");
    spans[place].style.setProperty("--share", count / most);
    spans[place].title = layer ? "layer " + (layer - 1) : count + " of " + most + " layers";
  });
  const chosen = spans[look.prompt.length + index];
  view.lit.push(chosen);
  chosen.classList.add("chosen");
  chosen.setAttribute("aria-selected", "true");
  answer.setAttribute("aria-activedescendant", chosen.id);
  drawOverview(view, counts, most);
  if (moves) {
    const seen = [...counts].filter(([place]) => place < look.prompt.length && look.prompt[place].trim());
    if (seen.length) show(view, seen.reduce((best, each) => (each[1] > best[1] ? each : best))[0]);
  }
  tell(view, index, counts, most, layer);
}

// Bring a token of the prompt into its box, without moving the page.
function show(view, place) {
  const {prompt, spans} = view;
  const top = spans[place].offsetTop; // of the box, which is positioned
  if (top < prompt.scrollTop || top > prompt.scrollTop + prompt.clientHeight - 30)
    prompt.scrollTop = top - prompt.clientHeight / 2;
}

// The whole prompt as one line: a long one is not seen at once in its box.
function drawOverview({look, prompt, strip}, counts, most) {
  strip.hidden = prompt.scrollHeight <= prompt.clientHeight;
  if (strip.hidden) return;
  const width = (strip.width = strip.clientWidth * devicePixelRatio);
  const height = (strip.height = strip.clientHeight * devicePixelRatio);
  const pen = strip.getContext("2d");
  pen.fillStyle = getComputedStyle(strip).color;
  const dot = Math.max(2 * devicePixelRatio, width / look.prompt.length);
  counts.forEach((count, place) => {
    if (place >= look.prompt.length) return;
    pen.globalAlpha = 0.35 + (0.65 * count) / most;
    pen.fillRect((place / look.prompt.length) * width, 0, dot, height);
  });
}

function clear(view) {
  view.lit.splice(0).forEach((span) => {
    span.classList.remove("lit", "chosen");
    span.removeAttribute("title");
    if (span.hasAttribute("aria-selected")) span.setAttribute("aria-selected", "false");
  });
}

function tell(view, index, counts, most, layer) {
  const {look} = view;
  const all = look.prompt.concat(look.answer);
  const words = [...counts].filter(([place]) => all[place].trim()).sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, 6);
  const who = layer ? "Layer " + (layer - 1) : "All " + most + " layers together";
  const count = (n) => (layer ? "" : " " + n + "/" + most);
  const list = words.map(([place, n]) => name(all[place].trim()) + count(n)).join(", ");
  const before = look.prompt.length + index;
  find("told").textContent = before && counts.size
    ? name(look.answer[index]) + ": " + who + " looked at " + counts.size + " of " + before + " tokens: " + list
    : name(look.answer[index]);
}

slider.addEventListener("input", () => {
  find("layer-name").textContent = Number(slider.value) ? String(slider.value - 1) : "all";
  slider.setAttribute("aria-valuetext", find("layer-name").textContent);
  if (shown) point(...shown);
});

// The chat.
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((each) => each.startsWith("data: "));
      if (line && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function post(body) {
  const headers = {"content-type": "application/json"};
  if (find("key").value) headers.authorization = "Bearer " + find("key").value;
  const signal = asking.signal;
  return fetch("/v1/chat/completions", {method: "POST", headers, body: JSON.stringify(body), signal});
}

// What an answer that is no success says; a proxy may write HTML.
async function readError(told) {
  const text = await told.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return "The server answers " + told.status + " " + told.statusText;
  }
}

let asking = null; // what stops the question that is under way

async function ask(question) {
  const turn = make("section", find("turns"));
  const number = find("turns").children.length;
  turn.setAttribute("aria-label", "Turn " + number);
  make("h2", turn, "Question");
  const told = make("div", turn, question, "text question");
  told.tabIndex = 0; // a long one is scrolled
  told.setAttribute("role", "region");
  told.setAttribute("aria-label", "Question " + number);
  make("h2", turn, "Answer");
  const live = make("div", turn, "", "text");
  live.setAttribute("aria-live", "polite");
  const said = messages; // "New chat" begins another list
  const asked = {role: "user", content: question};
  const body = {messages: [...said, asked], stream: true, max_tokens: 256, saccade: {selection: true}};
  let answered = "";
  let look = null;
  let isWhole = false;
  try {
    let reply = await post(body);
    if (reply.status === 400) {
      reply = await post({...body, saccade: undefined});
      if (reply.ok) make("p", turn, "This answer is too long to show where it looked.", "quiet");
    }
    if (reply.status === 401) find("key").focus();
    if (!reply.ok) throw new Error(await readError(reply));
    for await (const event of readEvents(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (!choice) continue;
      answered += choice.delta.content || "";
      live.textContent += (choice.delta.reasoning_content || "") + (choice.delta.content || "");
      look = choice.saccade || look;
      isWhole = isWhole || Boolean(choice.finish_reason);
    }
    if (!isWhole) throw new Error("The connection ended before the answer did.");
  } catch (error) {
    if (error.name !== "AbortError")
      find("error").textContent = error instanceof TypeError ? "The server does not answer." : error.message;
    if (!answered) {
      turn.remove();
      if (messages === said && !find("question").value) find("question").value = question;
      return;
    }
  }
  said.push(asked, {role: "assistant", content: answered});
  if (look) {
    live.previousSibling.remove();
    live.remove();
    const view = showLook(look, turn, number);
    if (look.answer.length) point(view, 0);
  }
}

find("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = find("question").value;
  find("error").textContent = "";
  if (asking || !question.trim()) return;
  asking = new AbortController();
  find("send").disabled = true;
  find("stop").hidden = false;
  find("question").value = "";
  await ask(question);
  asking = null;
  find("send").disabled = false;
  find("stop").hidden = true;
  find("question").focus();
});
find("stop").addEventListener("click", () => asking && asking.abort());
find("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("ask").requestSubmit();
});
find("anew").addEventListener("click", () => {
  if (asking) asking.abort();
  messages = [];
  shown = null;
  find("turns").replaceChildren();
  find("told").textContent = find("error").textContent = "";
  find("question").focus();
});

// The strip, out of /metrics.
let before = null;
async function measure() {
  if (document.hidden) return;
  const told = await fetch("/metrics").catch(() => null);
  if (!told || !told.ok) return;
  const values = new Map((await told.text()).split("\n").filter((line) => line.startsWith("saccade_"))
    .map((line) => [line.slice(0, line.lastIndexOf(" ")), Number(line.slice(line.lastIndexOf(" ") + 1))]));
  const value = (key) => values.get("saccade_" + key) || 0;
  const share = (part, whole) => (whole ? Math.round((100 * part) / whole) + " %" : "-");
  const now = [performance.now() / 1000, value("generation_tokens_total")];
  if (before) find("speed").textContent = ((now[1] - before[1]) / (now[0] - before[0])).toFixed(1);
  before = now;
  find("batch").textContent = value("requests_running") + " run, " + value("requests_waiting") + " wait";
  find("cache").textContent = share(value("cache_usage_ratio"), 1);
  find("prefix").textContent = share(value("prefix_hit_tokens_total"), value("prefix_asked_tokens_total"));
  find("drafts").textContent = share(value("accepted_tokens_total"), value("drafted_tokens_total"));
}

find("title").textContent = document.title = data.title;
if (data.look) {
  const section = make("section", find("turns"));
  section.setAttribute("aria-label", "Answer");
  const view = showLook(data.look, section, 1);
  if (data.look.answer.length) point(view, 0);
} else {
  find("ask").hidden = find("strip").hidden = false;
  measure();
  setInterval(measure, 1000);
}
