"use strict";
// Keeps the page current. All text goes in as text (textContent), never as markup, since clients choose some of it.
const at = (id) => document.getElementById(id);
const say = (id, text) => { const node = at(id); if (node.textContent !== text) node.textContent = text; };
const known = (value) => value !== null && value !== undefined;
const bytes = (count) => {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 1000) return (unit === "B" ? count.toFixed(0) : count.toFixed(1)) + " " + unit;
    count /= 1000;
  }
  return count.toFixed(1) + " TB";
};
const span = (seconds) => {
  const all = Math.round(seconds), minutes = Math.floor(all / 60), pad = (value) => String(value).padStart(2, "0");
  return minutes >= 60 ? Math.floor(minutes / 60) + ":" + pad(minutes % 60) + ":" + pad(all % 60) : minutes + ":" + pad(all % 60);
};

let rounds = [], clients = new Map(), rows = new Map();

function draw(id, series, zero) {
  const svg = at(id), make = (name, values, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in values) node.setAttribute(key, values[key]);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
  };
  svg.replaceChildren();
  const points = series.map(([color, read]) => [color, rounds.map((one) => [one.round, read(one)]).filter((pair) => known(pair[1]))]);
  const values = points.flatMap((part) => part[1].map((pair) => pair[1]));
  if (!values.length) { make("text", {x: 230, y: 100, "text-anchor": "middle", "font-size": 12}, "nothing yet"); return; }
  const top = Math.max(...values) || 1, low = zero ? 0 : Math.min(0, ...values), last = Math.max(2, rounds[rounds.length - 1].round);
  const x = (round) => 64 + 386 * (round - 1) / (last - 1), y = (value) => 170 - 150 * (value - low) / (top - low || 1);
  for (const value of [low, (low + top) / 2, top]) {
    make("line", {x1: 64, x2: 450, y1: y(value), y2: y(value), stroke: "var(--line)"});
    const label = id === "bytes" ? bytes(value) : Number(value.toPrecision(3));
    make("text", {x: 59, y: y(value) + 4, "text-anchor": "end", "font-size": 11}, label);
  }
  make("text", {x: 64, y: 190, "font-size": 11}, "round 1");
  make("text", {x: 450, y: 190, "text-anchor": "end", "font-size": 11}, last);
  for (const [color, pairs] of points) {
    const line = pairs.map((pair) => x(pair[0]).toFixed(1) + "," + y(pair[1]).toFixed(1)).join(" ");
    make("polyline", {points: line, fill: "none", stroke: color, "stroke-width": 2});
    if (pairs.length) { const end = pairs[pairs.length - 1]; make("circle", {cx: x(end[0]), cy: y(end[1]), r: 3, fill: color}); }
  }
}

function show_rounds() {
  const last = rounds[rounds.length - 1], latest = (key) => rounds.findLast((one) => known(one[key]));
  const loss = latest("loss"), evaluated = latest("eval"), scored = latest("score");
  say("loss", loss ? Number(loss.loss.toPrecision(4)) + "" : "–");
  say("eval", evaluated ? "held-out examples " + Number(evaluated.eval.toPrecision(4)) : "");
  say("metric", scored ? scored.metric : "Score");
  say("score", scored ? (100 * scored.score).toFixed(1) + "%" : "–");
  say("scored", scored ? "after round " + scored.round : "");
  const up = rounds.reduce((sum, one) => sum + one.up, 0), down = rounds.reduce((sum, one) => sum + one.down, 0);
  say("moved", bytes(up + down));
  say("ways", bytes(up) + " up, " + bytes(down) + " down");
  say("pace", last ? "last round " + span(last.seconds) + ", " + last.answered + " of " + last.asked + " answered" : "");
  draw("losses", [["var(--accent)", (one) => one.loss], ["#ea8a2e", (one) => one.eval]], false);
  draw("scores", [["var(--good)", (one) => one.score]], true);
  draw("bytes", [["var(--accent)", (one) => one.up], ["#ea8a2e", (one) => one.down]], true);
  draw("seconds", [["var(--accent)", (one) => one.seconds]], true);
}

function show_job(job) {
  say("name", job.name || "Waiting for a job");
  document.title = (job.name ? job.name + " · round " + job.round + "/" + job.rounds : "live") + " · fedtune";
  say("state", job.state || (job.name ? "training" : ""));
  say("round", job.rounds ? job.round + " / " + job.rounds : "–");
  say("answered", job.cohort ? job.answered + " of " + job.cohort + " answered" : "");
  say("left", known(job.left) ? span(job.left) : "–");
}

function show_client(name, values) {
  let row = rows.get(name);
  if (!row) {
    row = document.createElement("tr");
    for (const kind of ["", "", "number", "number", "number", "", "number", ""]) {
      const cell = document.createElement("td");
      cell.className = kind;
      row.append(cell);
    }
    const label = document.createElement("bdi");
    label.textContent = name;
    row.cells[0].append(label);
    rows.set(name, row);
    at("table").append(row);
  }
  const heard = known(values.heard) ? span(Math.max(0, Date.now() / 1000 - values.heard)) + " ago" : "";
  const texts = [values.state || "", values.rounds, known(values.seconds) ? values.seconds + " s" : "",
    known(values.predicted) ? values.predicted + " s" : "", values.plan || "", heard, values.dropped || ""];
  texts.forEach((text, place) => {
    const cell = row.cells[place + 1];
    if (cell.textContent !== String(text)) cell.textContent = text;
  });
}

function take(news) {
  if (news.begin) { rounds = []; clients = new Map(); rows = new Map(); at("table").replaceChildren(); at("notes").replaceChildren(); }
  if (news.job) show_job(news.job);
  for (const name in news.clients || {}) { clients.set(name, news.clients[name]); show_client(name, news.clients[name]); }
  for (const name of news.gone || []) { clients.delete(name); rows.get(name)?.remove(); rows.delete(name); }
  if (news.clients || news.gone) {
    const states = [...clients.values()].map((one) => one.state).filter(Boolean);
    say("clients", clients.size + "");
    say("online", states.length ? states.filter((one) => one === "online").length + " online" : "");
  }
  if (news.rounds) rounds.push(...news.rounds);
  if (news.rounds || news.begin) show_rounds();
  if (news.notes) at("notes").replaceChildren(...news.notes.map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
}

const source = new EventSource("events");
source.onopen = () => { at("lost").hidden = true; };
source.onerror = () => { at("lost").hidden = false; };
source.onmessage = (event) => {
  const began = performance.now();
  take(JSON.parse(event.data));
  document.body.dataset.milliseconds = (performance.now() - began).toFixed(1);
  document.body.dataset.rounds = rounds.length;
};
setInterval(() => clients.forEach((values, name) => { if (known(values.heard)) show_client(name, values); }), 5000);
