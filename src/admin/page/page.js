
const SVG = "http://www.w3.org/2000/svg";
const MAX_ROWS = 100;
const FEW_LOOPS = 16;
const PERIOD = 1000;
const LONGEST_PERIOD = 5000;
const HIDDEN_PERIOD = 30000;
const PATIENCE = 5000;

const at = (id) => document.getElementById(id);

/** Sets a text where it differs, so that a selection and a screen reader are not disturbed. */
function say(node, text) {
  text = String(text ?? "");
  if (node.textContent !== text) node.textContent = text;
}

function dress(node, names) {
  if (node.className !== names) node.className = names;
}

/** Returns the child of that number, made if it is missing. */
function child(parent, index, name, role) {
  let node = parent.children[index];
  if (!node) {
    node = document.createElement(name);
    if (role) node.setAttribute("role", role);
    parent.append(node);
  }
  return node;
}

function trim(parent, length) {
  while (parent.children.length > length) parent.lastElementChild.remove();
}

const whole = (number) => number.toLocaleString("en");

function rate(number) {
  if (number === 0) return "0";
  if (number < 0.1) return number.toFixed(2);
  return number < 10 ? number.toFixed(1) : whole(Math.round(number));
}

function span(seconds) {
  if (seconds < 10) return `${Math.max(0, seconds).toFixed(1)} s`;
  const s = Math.floor(seconds);
  if (s < 60) return `${s} s`;
  const pad = (n) => String(n).padStart(2, "0");
  if (s < 3600) return `${Math.floor(s / 60)} m ${pad(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${pad(Math.floor(s / 60) % 60)} m`;
  return `${Math.floor(s / 86400)} d ${pad(Math.floor(s / 3600) % 24)} h`;
}

const clock = (date) => date.toLocaleTimeString("en-GB");

function bytes(count) {
  if (count == null) return "";
  return count < 10485760 ? `${(count / 1048576).toFixed(1)} MiB` : `${whole(Math.round(count / 1048576))} MiB`;
}

/** Fills a list of names and values. */
function list(target, entries) {
  entries.forEach(([name, value, names], index) => {
    const pair = child(target, index, "div");
    say(child(pair, 0, "dt"), name);
    const shown = child(pair, 1, "dd");
    say(shown, value);
    dress(shown, names ?? "");
  });
  trim(target, entries.length);
}

/** Fills a table. A column is a heading and classes; a cell is a text, or a text and more classes and a title. */
function table(target, columns, rows, empty) {
  target.setAttribute("role", "table");
  const heading = child(child(target, 0, "thead", "rowgroup"), 0, "tr", "row");
  const body = child(target, 1, "tbody", "rowgroup");
  columns.forEach(([name, names], index) => {
    const cell = child(heading, index, "th", "columnheader");
    say(cell, name);
    dress(cell, names);
  });
  heading.parentNode.hidden = rows.length === 0;
  const filled = rows.length > 0 || !empty ? rows : [{ cells: [{ text: empty, names: "empty" }] }];
  filled.forEach((row, index) => fill(child(body, index, "tr", "row"), columns, row));
  trim(body, filled.length);
}

function fill(line, columns, row) {
  dress(line, row.names ?? "");
  row.cells.forEach((value, index) => {
    const cell = child(line, index, "td", "cell");
    const { text, names, title } = value !== null && typeof value === "object" ? value : { text: value };
    say(cell, text);
    dress(cell, `${columns[index][1]} ${names ?? ""}`.trim());
    if ((cell.title || "") !== (title ?? "")) cell.title = title ?? "";
    if (cell.dataset.label !== columns[index][0]) cell.dataset.label = columns[index][0];
  });
  trim(line, row.cells.length);
}

function showHead(status) {
  const isGood = status.state === "running" && status.connected;
  const state = status.connected ? status.state : `${status.state}, not connected`;
  say(at("state"), state);
  dress(at("state"), `pill ${isGood ? "good" : status.connected ? "warn" : "bad"}`);
  document.title = `${status.running} running · ${status.worker_id}`;
  list(at("facts"), [
    ["server", status.settings.url?.value],
    ["worker", status.worker_id],
    ["up", span(status.uptime_seconds)],
    ["version", status.version],
  ]);
  const reasons = status.unready;
  reasons.forEach((reason, index) => say(child(at("unready"), index, "li"), `Not ready: ${reason}`));
  trim(at("unready"), reasons.length);
  at("unready").hidden = reasons.length === 0;
}

function showJobs(status) {
  const { history } = status;
  const ended = history.succeeded.map((count, index) => count + history.failed[index]);
  // The newest bucket has only begun: together with the one before, it says what is going on now.
  const seconds = history.newest_bucket_seconds + (ended.length > 1 ? history.bucket_seconds : 0);
  const recent = (ended.at(-1) ?? 0) + (ended.at(-2) ?? 0);
  list(at("tiles"), [
    ["jobs a second", rate(recent / Math.max(1, seconds))],
    ["running", `${whole(status.running)} / ${whole(status.loops.length)}`],
    ["waiting", whole(status.waiting)],
    ["succeeded", whole(status.succeeded)],
    ["failed", whole(status.failed), status.failed > 0 ? "bad" : ""],
    ["interrupted", whole(status.interrupted)],
    ["reports waiting", whole(status.reports_waiting)],
  ]);
  draw(history, ended);
}

/** Draws a bar for each bucket that is over: those that succeeded, and on top of them those that failed. */
function draw(history, ended) {
  const last = ended.length - 1;
  const most = Math.max(...ended.slice(0, last), 1);
  const width = 600 / 119;
  const parts = [];
  for (let index = 0; index < last; index += 1) {
    const x = 600 - (last - index) * width;
    const ok = (history.succeeded[index] / most) * 100;
    // A failure among thousands of successes is still seen.
    const bad = history.failed[index] && Math.max((history.failed[index] / most) * 100, 3);
    if (ok > 0) parts.push(["ok", x, 100 - Math.max(ok, 1), Math.max(ok, 1)]);
    if (bad > 0) parts.push(["bad", x, Math.max(100 - ok - bad, 0), bad]);
  }
  const plot = at("plot");
  parts.forEach(([names, x, y, height], index) => {
    let bar = plot.children[index];
    if (!bar) plot.append((bar = document.createElementNS(SVG, "rect")));
    bar.setAttribute("class", names);
    for (const [name, value] of Object.entries({ x, y, width: width * 0.8, height })) bar.setAttribute(name, value.toFixed(2));
  });
  trim(plot, parts.length);
  const sum = (counts) => counts.reduce((one, other) => one + other, 0);
  const minutes = Math.round((119 * history.bucket_seconds) / 60);
  const [ok, bad] = [sum(history.succeeded), sum(history.failed)];
  say(at("ok"), `${whole(ok)} succeeded`);
  say(at("bad"), `${whole(bad)} failed`);
  say(at("peak"), `peak ${rate(most / history.bucket_seconds)} a second`);
  at("peak").hidden = sum(ended.slice(0, last)) === 0;
  say(at("oldest"), `${minutes} minutes ago`);
  const label = `In the last ${minutes} minutes, ${ok} jobs succeeded and ${bad} failed`;
  if (plot.getAttribute("aria-label") !== label) plot.setAttribute("aria-label", label);
}

const LOOPS = [
  ["loop", "mono short"], ["type", ""], ["job", "id"], ["queue", ""], ["attempt", "num"], ["running for", "num"], ["pid", "num"],
];

function showLoops({ loops }) {
  const busy = loops.filter((loop) => loop.job);
  const isFew = loops.length <= FEW_LOOPS;
  if (!isFew) busy.sort((one, other) => other.job.running_seconds - one.job.running_seconds);
  const shown = isFew ? loops : busy.slice(0, MAX_ROWS);
  const left = busy.length - MAX_ROWS;
  const more = !isFew && left > 0 ? `, the ${MAX_ROWS} that run longest are shown; /status has all` : "";
  say(at("n-loops"), `${whole(busy.length)} busy, ${whole(loops.length - busy.length)} idle${more}`);
  table(at("loops"), LOOPS, shown.map(({ name, job }) => (job
    ? { cells: [name, job.type, job.id, job.queue, job.attempt, span(job.running_seconds), job.pid] }
    : { cells: [name, "idle", "", "", "", "", ""], names: "idle" })), "No loop has a job.");
}

const FAILURES = [
  ["when", "short soft"], ["type", ""], ["kind", ""], ["message", "wide"], ["job", "id"], ["queue", ""], ["attempt", "num"],
];

function showFailures({ last_failures: failures }) {
  table(at("failures"), FAILURES, failures.map((failure) => ({
    cells: [
      { text: `${span(failure.ago_seconds)} ago`, title: clock(new Date(Date.now() - failure.ago_seconds * 1000)) },
      failure.type, failure.error_type, { text: failure.message, names: "bad" }, failure.id, failure.queue, failure.attempt,
    ],
  })), "No job has failed since the worker started.");
}

const HANDLERS = [["jobs of type", ""], ["program", "mono"], ["mode", ""], ["starts", "num"], ["processes", "num"], ["condition", "wide"]];
const PROCESSES = [
  ["process of", "mono"], ["pid", "num"], ["state", ""], ["jobs", "num"], ["age", "num"], ["memory", "num"], ["job", "id wide"],
];

function condition(brake) {
  if (!brake) return { text: "works", names: "soft" };
  const next = brake.pause_seconds > 0 ? `next start in ${span(brake.pause_seconds)}` : "next start now";
  const failures = brake.failures === 1 ? "1 failure" : `${whole(brake.failures)} failures in a row`;
  return { text: `slowed down after ${failures}, ${next}: ${brake.error}`, names: "bad" };
}

function showHandlers({ handlers, handler_processes: processes }) {
  const isOnly = handlers.length === 1;
  table(at("handlers"), HANDLERS, handlers.slice(0, MAX_ROWS).map((handler) => ({
    cells: [
      handler.type ?? { text: isOnly ? "any" : "any other", names: "soft" },
      handler.handler, handler.mode, whole(handler.starts),
      handler.mode === "warm" ? handler.pids.length : "", condition(handler.brake),
    ],
  })), "");
  table(at("processes"), PROCESSES, processes.slice(0, MAX_ROWS).map((process) => ({
    cells: [
      process.handler, process.pid, process.state, whole(process.jobs), span(process.age_seconds),
      bytes(process.memory_bytes), process.job,
    ],
    names: process.state === "idle" ? "idle" : "",
  })), "");
  at("processes").hidden = processes.length === 0;
}

function showSettings({ settings }) {
  const rows = Object.entries(settings).map(([name, { value, source }]) => ({
    cells: [{ text: name, names: "mono" }, { text: value, names: "mono" }, { text: source, names: source === "default" ? "soft" : "" }],
  }));
  table(at("settings"), [["setting", ""], ["value", ""], ["from", ""]], rows, "");
}

function show(status) {
  for (const part of [showHead, showJobs, showLoops, showFailures, showHandlers, showSettings]) part(status);
}

async function ask() {
  const answer = await fetch("status", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
  if (!answer.ok) throw new Error(`the answer was HTTP ${answer.status}`);
  return answer.json();
}

let version;
let lostSince;
let period = PERIOD;
let timer;
let isAsking = false;

function found(status) {
  // The worker was replaced by another version, which has another page.
  if (version && version !== status.version) return location.reload();
  version = status.version;
  [lostSince, period] = [undefined, PERIOD];
  at("lost").hidden = true;
  document.body.classList.remove("lost");
  show(status);
}

function lost() {
  if (!lostSince) {
    lostSince = new Date();
    say(at("lost"), `No answer from the worker since ${clock(lostSince)}. What is shown below is from before. Trying again.`);
    at("lost").hidden = false;
    document.body.classList.add("lost");
    say(at("state"), "no answer");
    dress(at("state"), "pill bad");
    document.title = "no answer · zizq-worker";
  }
  period = Math.min(period * 1.5, LONGEST_PERIOD);
}

async function refresh() {
  clearTimeout(timer);
  if (isAsking) return;
  isAsking = true;
  let status;
  try {
    status = await ask();
  } catch {
    lost();
  }
  isAsking = false;
  timer = setTimeout(refresh, document.hidden ? HIDDEN_PERIOD : period);
  if (status) found(status);
}

document.addEventListener("visibilitychange", () => document.hidden || refresh());
refresh();
