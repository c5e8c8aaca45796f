"use strict";
// What a file or a prompt gets: the label or text, the adapters that fired, and the version.
const $ = (id) => document.getElementById(id);
let asked = 0;

function say(text) { $("state").textContent = text; $("state").hidden = text === ""; }

function bars(where, rows) {
  where.replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("div"), bar = document.createElement("progress");
    const label = document.createElement("span"), number = document.createElement("span");
    row.className = "row";
    label.textContent = name;
    bar.max = 1;
    bar.value = Math.max(0, Math.min(1, value));
    bar.setAttribute("aria-label", name);
    number.textContent = (100 * value).toFixed(1) + " %";
    row.append(label, bar, number);
    return row;
  }));
}

function show(version, label, classes, weights, unlike) {
  $("label").textContent = label;
  $("unlike").hidden = unlike !== true;
  $("classes-title").hidden = classes.length === 0;
  bars($("classes"), classes.map((one) => [one.label, one.probability]));
  bars($("adapters"), weights.map((one) => [one.adapter, one.weight]));
  $("by").textContent = $("version").textContent = version;
  $("found").hidden = false;
  say("");
}

async function post(path, body, headers = {}) {
  const mine = ++asked;
  say("…");
  $("found").hidden = true;
  if ($("key").value) headers["Authorization"] = "Bearer " + $("key").value;
  try {
    const response = await fetch(path, { method: "POST", body, headers });
    const found = await response.json();
    if (mine !== asked) return null;
    if (response.ok) return found;
    say(found.error.message + (found.error.expected ? " (expected: " + found.error.expected + ")" : ""));
  } catch (error) {
    if (mine === asked) say("No answer: " + error.message);
  }
  return null;
}

async function predict(file) {
  if (!file) return;
  URL.revokeObjectURL($("shown").src);
  $("shown").src = URL.createObjectURL(file);
  $("shown").alt = file.name;
  $("shown").hidden = false;
  $("hint").textContent = file.name;
  const form = new FormData();
  form.append("file", file);
  form.append("topk", "5");
  const found = await post("/v1/predict", form);
  if (!found) return;
  const one = found.predictions[0];
  show(found.version, one.label, one.classes, one.weights, one.unlike);
}

async function answer() {
  const body = JSON.stringify({ prompt: $("prompt").value });
  const found = await post("/v1/generate", body, { "Content-Type": "application/json" });
  if (!found) return;
  const one = found.answers[0];
  $("label").className = "text";
  show(found.version, one.text, [], one.weights, null);
}

async function begin() {
  const health = await (await fetch("/healthz")).json();
  $("memory").textContent = document.title = health.memory;
  $("version").textContent = health.version;
  $("keyed").hidden = !health.key;
  $(health.reads === "images" ? "drop" : "prompting").hidden = false;
}

const drop = $("drop");
$("ask").addEventListener("submit", (event) => { event.preventDefault(); answer(); });
$("file").addEventListener("change", (event) => predict(event.target.files[0]));
for (const kind of ["dragenter", "dragover"]) {
  drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  predict(event.dataTransfer.files[0]);
});
begin().catch((error) => say("No answer: " + error.message));
