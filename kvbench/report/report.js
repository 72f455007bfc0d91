"use strict";
// Sorting of tables, and the drill-down into samples. Text from models is only ever set as text.

const data = JSON.parse(document.getElementById("samples-data").textContent);

function element(name, text, parent) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// A cell sorts by its data-value if it has one; empty values stay last in either direction.
function sortBy(table, column, button) {
  const down = button.dataset.order === "up";
  for (const other of table.querySelectorAll("th button")) delete other.dataset.order;
  button.dataset.order = down ? "down" : "up";
  const body = table.tBodies[0];
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const rows = Array.from(body.rows).sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const numbers = [Number(x), Number(y)];
    const order = numbers.some(Number.isNaN) ? x.localeCompare(y) : numbers[0] - numbers[1];
    return down ? -order : order;
  });
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  Array.from(table.tHead.rows[0].cells).forEach((cell, column) => {
    const button = cell.querySelector("button");
    button.addEventListener("click", () => sortBy(table, column, button));
  });
}

const chosen = { setting: 0, curve: 0, budget: 0, sample: null };
const selects = {
  setting: document.getElementById("pick-setting"),
  curve: document.getElementById("pick-curve"),
  budget: document.getElementById("pick-budget"),
};
const list = document.getElementById("sample-list");
const detail = document.getElementById("sample-detail");

function fill(select, texts, index) {
  select.replaceChildren(...texts.map((text, i) => new Option(text, i)));
  select.selectedIndex = index;
}

function showDetail(setting, curve, cell) {
  const sample = setting.samples[cell[0]];
  const full = setting.curves[0].budgets[0].cells.find((other) => other[0] === cell[0]);
  detail.replaceChildren();
  element("h3", `Sample ${cell[0]} (${sample.subtask}), ${curve.label}: score ${cell[1]}`, detail);
  const parts = [
    ["The prompt's tail", sample.tail],
    ["Prediction", cell[2]],
    ["Reference", sample.reference],
  ];
  if (full && full !== cell) parts.push([`Full attention's prediction: score ${full[1]}`, full[2]]);
  for (const [name, text] of parts) {
    element("h4", name, detail);
    element("pre", text, detail);
  }
}

function show() {
  const setting = data.settings[chosen.setting];
  const curve = setting.curves[chosen.curve];
  chosen.budget = Math.min(chosen.budget, curve.budgets.length - 1);
  const cells = curve.budgets[chosen.budget].cells;
  fill(selects.setting, data.settings.map((s) => s.title), chosen.setting);
  fill(selects.curve, setting.curves.map((c) => c.label), chosen.curve);
  fill(selects.budget, curve.budgets.map((b) => `budget ${b.budget}`), chosen.budget);
  list.replaceChildren();
  for (const cell of cells) {
    const row = element("tr", undefined, list);
    const opener = element("button", cell[0], element("td", undefined, row));
    element("td", setting.samples[cell[0]].subtask, row);
    element("td", cell[1].toFixed(2), row);
    element("td", cell[2], row).className = "text";
    const open = () => {
      chosen.sample = cell[0];
      for (const other of list.rows) other.classList.toggle("open", other === row);
      showDetail(setting, curve, cell);
    };
    opener.addEventListener("click", open);
    if (cell[0] === chosen.sample) open();
  }
  if (!cells.some((cell) => cell[0] === chosen.sample)) detail.replaceChildren();
}

for (const [name, select] of Object.entries(selects)) {
  select.addEventListener("change", () => {
    chosen[name] = select.selectedIndex;
    if (name === "setting") chosen.curve = chosen.budget = 0;
    show();
  });
}

// A score in a table opens its samples.
for (const button of document.querySelectorAll("button.score")) {
  button.addEventListener("click", () => {
    chosen.setting = Number(button.dataset.setting);
    const curves = data.settings[chosen.setting].curves;
    chosen.curve = curves.findIndex((curve) => curve.label === button.dataset.curve);
    chosen.budget = curves[chosen.curve].budgets.findIndex(
      (budget) => budget.budget === Number(button.dataset.budget));
    show();
    document.getElementById("samples").scrollIntoView();
  });
}

show();
