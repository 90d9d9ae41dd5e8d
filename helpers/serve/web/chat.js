"use strict";

const $ = (id) => document.getElementById(id);
// The conversation as the service gets it; the page remembers it, the service does not.
let messages = [];
let request = null;

// Changes the page and stays at its end, unless the reader has scrolled up.
function change(edit) {
  const page = document.documentElement;
  const atEnd = innerHeight + scrollY > page.scrollHeight - 50;
  edit();
  if (atEnd) scrollTo(0, page.scrollHeight);
}

function show(kind, text) {
  const element = document.createElement("div");
  element.className = kind;
  element.textContent = text;
  change(() => $("log").append(element));
  return element;
}

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? { message: `HTTP ${response.status}` };
  return Object.assign(new Error(error.message), { code: error.code });
}

// Server-sent events of a response, as the data of each.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const lines = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
      text = text.slice(end + 2);
      if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}

async function post(signal) {
  for (;;) {
    const body = { messages, stream: true, temperature: Number($("temperature").value) || 0 };
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal,
    });
    if (response.ok) return response;
    const error = await refusal(response);
    if (error.code !== "context_length_exceeded" || messages.length < 3) throw error;
    messages = messages.slice(2);
    show("notice", say("The oldest turn is forgotten: the conversation no longer fits the compiled length."));
  }
}

function figures({ first_token_s, tokens_per_s, kind }) {
  const time = kind === "measured" ? say("measured on the chip") : say("simulator wall time");
  const speed = tokens_per_s ? ` · ${tokens_per_s.toFixed(2)} token/s` : "";
  return `${say("first token {} s", first_token_s.toFixed(2))}${speed} (${time})`;
}

function busy(is) {
  for (const button of document.querySelectorAll("#send, #known button")) button.disabled = is;
  $("stop").disabled = !is;
}

async function ask(question) {
  const asked = { role: "user", content: question };
  const answer = { role: "assistant", content: "" };
  messages.push(asked);
  show("user", question);
  const element = show("assistant", "");
  scrollTo(0, document.documentElement.scrollHeight);
  // Read out when it is whole, not at every piece.
  $("log").ariaBusy = "true";
  request = new AbortController();
  busy(true);
  let finished = false;
  try {
    const response = await post(request.signal);
    for await (const data of events(response)) {
      if (data === "[DONE]") { finished = true; break; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      answer.content += chunk.choices[0]?.delta.content ?? "";
      change(() => { element.textContent = answer.content; });
      if (chunk.choices[0]?.finish_reason === "length") show("notice", say("cut: the limit of new tokens, or of S, is reached"));
      if (chunk.timings) show("figures", figures(chunk.timings));
    }
    if (!finished) throw new Error(say("The service ended the answer early."));
  } catch (error) {
    // fetch and its body throw a TypeError where there is no connection (any more).
    const lost = answer.content ? say("The service ended the answer early.") : say("The service does not answer: is it running?");
    if (error.name !== "AbortError") show("error", error instanceof TypeError ? lost : error.message);
    else if (messages.at(-1) === asked) show("notice", say("stopped"));
    if (error.code === "invalid_api_key") {
      $("settings").open = true;
      $("key").focus();
    }
  }
  if (!answer.content) element.remove();
  // A turn without an answer would leave two questions in a row.
  if (messages.at(-1) === asked) {
    if (answer.content) messages.push(answer);
    else {
      messages.pop();
      $("question").value ||= question;
    }
  }
  $("log").ariaBusy = "false";
  request = null;
  busy(false);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || request) return;
  $("question").value = "";
  ask(question);
});

$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});

$("stop").addEventListener("click", () => request?.abort());

$("clear").addEventListener("click", () => {
  request?.abort();
  messages = [];
  $("log").replaceChildren();
});

// A model that has learnt its answers by heart says so, and offers some of its questions.
function offer({ answers, questions }) {
  $("known").firstElementChild.textContent =
    say("This model knows the answers to {} questions by heart, and nothing else. Some of them:", answers);
  for (const question of questions) {
    const button = document.createElement("button");
    button.textContent = question;
    button.disabled = request !== null;
    button.addEventListener("click", () => ask(question));
    $("known").append(button);
  }
  $("known").hidden = false;
}

fetch("health").then(async (response) => {
  const health = await response.json();
  $("about").textContent = say("{} on the {}, {} tokens", health.model, say(health.engine), health.seq_length) +
    (response.ok ? "" : ` · ${health.failure ?? say(health.status)}`);
  if (health.by_heart) offer(health.by_heart);
}, () => { $("about").textContent = say("The service does not answer."); });
