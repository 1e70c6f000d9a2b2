"use strict";
// What has been decoded is a function of the time alone: `draw` may be called with any time after any other.
const runs = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const PHASES = ["given", "diffusion", "sequential", "left", "decided"], LEFT = 3, DECIDED = 4;
const SAID = ["given", "by diffusion", "in sequence"];
const SHADES = ["0%", "9%", "18%", "28%", "40%", "54%"];
const SCALES = {
  logp: {ends: [0.9, 0.5, 0.2, 0.05, 0.01], of: x => x.p, label: ["> 90%", "> 50%", "> 20%", "> 5%", "> 1%", "less"]},
  entropy: {ends: [-0.1, -0.5, -1, -2, -3], of: x => -x.entropy, label: ["< 0.1", "< 0.5", "< 1", "< 2", "< 3 nats", "more"]},
  step: {ends: [1, 2, 3, 4, 5].map(i => -i / 6), of: x => -(x.step + 0.5) / x.run.passes,
    label: ["first sixth", "", "", "", "", "last"]},
};
const NEWLINE = "\u21b5\n";
const whole = new Intl.NumberFormat("en").format;
const percent = p => (100 * p).toFixed(p >= 0.1 ? 0 : p >= 0.01 ? 1 : 2) + "%";
const nats = x => x === null ? "not a number" : x.toFixed(4).replace("-", "\u2212");

function make(tag, attributes = {}, ...inside) {
  const made = document.createElementNS(tag === "svg" || tag === "path" || tag === "rect"
    ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...inside);
  return made;
}

// A piece of text as what it is: blanks, tabs and ends of lines are seen, and so is what has no glyph of its own.
function written(piece, id) {
  if (piece === null) return [make("i", {class: "raw"}, "end of text")];
  if (piece === undefined || piece === "") return [make("i", {class: "raw"}, "#" + id)];
  const out = [];
  for (const c of piece) {
    const code = c.codePointAt(0), hex = code.toString(16).toUpperCase();
    if (c === " ") out.push(make("i", {}, "\u00b7"));
    else if (c === "\t") out.push(make("i", {}, "\u21e5\t"));
    else if (c === "\n") out.push(make("i", {}, NEWLINE));
    else if (code >= 0xdc80 && code <= 0xdcff)  // a byte that is no UTF-8, from Python's surrogateescape
      out.push(make("i", {class: "raw"}, "\\x" + (code - 0xdc00).toString(16).toUpperCase()));
    else if (/[\p{C}\p{Z}]/u.test(c))
      out.push(make("i", {class: "raw"}, code < 256 ? "\\x" + hex.padStart(2, "0") : "\\u{" + hex + "}"));
    else if (out.length === 0 && /\p{M}/u.test(c)) out.push("\u25cc" + c);
    else if (typeof out.at(-1) === "string") out.push(out.pop() + c);
    else out.push(c);
  }
  return out;
}
const plain = nodes => nodes.map(node => node.textContent ?? node).join("").trim();

class Panel {
  constructor(run, sample) {
    this.run = run;
    this.passes = 0;
    this.title = make("h2", {}, run.label, make("small", {}, run.name));
    this.facts = make("div", {class: "facts"});
    this.said = make("div", {class: "facts"});
    this.kept = make("span", {class: "kept"});
    this.now = make("span", {class: "run"});
    this.text = make("div", {class: "text", role: "group", "aria-label": `${run.label}: tokens`});
    this.ahead = make("rect", {class: "ahead", y: 0, height: 1});
    const top = make("div", {class: "top"}, this.title);
    if (run.samples.length > 1) {
      this.chooser = make("select", {"aria-label": `Sample of ${run.label}`},
        ...run.samples.map((_, i) => make("option", {value: i}, `sample ${i}`)));
      this.chooser.value = sample;
      this.chooser.onchange = () => { this.choose(Number(this.chooser.value)); draw(); };
      top.append(this.chooser);
    }
    this.plan = make("svg", {class: "plan", viewBox: `0 0 ${run.passes} 1`, preserveAspectRatio: "none", role: "img"});
    this.root = make("section", {class: "panel", "aria-label": run.label}, top, this.facts, this.plan,
      make("div", {class: "cache", "aria-hidden": "true"}, this.kept, this.now), this.said, this.text);
    this.choose(sample);
  }

  choose(number) {
    const {run} = this, of = run.samples[number];
    this.number = number;
    this.tokens = of.tokens.map((id, at) => {
      const token = {run, at, id, step: of.step[at], phase: of.phase[at], logp: of.logp[at], rule: of.logp_rule[at],
        entropy: of.entropy[at], others: of.alternatives[at], theirs: of.alternatives_logp[at], panel: this};
      token.p = token.logp === null ? 0 : Math.exp(token.logp);
      const text = written(run.pieces[id], id), last = text.at(-1);
      if (last.textContent === NEWLINE) last.textContent = "\u21b5";  // the line ends behind the box
      token.behind = last.textContent === "\u21b5" ? "\n" : make("wbr");
      token.box = make("span", {class: "t masked", role: "button", tabindex: at ? -1 : 0}, ...text);
      token.box.token = token;
      return token;
    });
    this.text.replaceChildren(...this.tokens.flatMap(token => [token.box, token.behind]));
    const counts = of.counts, most = Math.max(...counts);
    const bars = phase => counts.map((count, step) => (of.phases[step] === phase && count
      ? `M${step} 1v${-count / most}h.8V1z` : "")).join("");
    this.plan.replaceChildren(make("path", {class: "diffusion", d: bars(1)}), make("path", {class: "sequential", d: bars(2)}),
      make("path", {class: "decided", d: bars(DECIDED)}),
      this.ahead);
    this.plan.setAttribute("aria-label", `Tokens decoded by each of ${run.passes} passes, at most ${most}`);
    this.computed = [of.window.length ? of.window[0][0] : 0];  // the pass over the given tokens
    for (const [low, high] of of.window) this.computed.push(this.computed.at(-1) + high - low);
    this.done = [of.phase.filter(phase => phase === 0).length];
    for (const count of counts) this.done.push(this.done.at(-1) + count);
    this.window = of.window;
    this.passes = null;
  }

  draw(passes) {
    const {run} = this, length = this.tokens.length, before = this.passes;
    if (passes === before) return;
    this.passes = passes;
    for (const token of this.tokens) {
      const {box, step} = token, left = token.phase === LEFT;
      const masked = step >= passes || left, fresh = step === passes - 1 && step >= 0 && !left;
      if (before !== null && (left || masked === (step >= before) && fresh === (step === before - 1 && step >= 0))) continue;
      box.className = `t ${PHASES[token.phase]}${masked ? " masked" : ""}${fresh ? " new" : ""}`;
      box.setAttribute("aria-label", masked ? `position ${token.at}, masked` : spoken(token));
      paint(token);
    }
    const seconds = run.seconds ? ` \u00b7 ${(run.seconds * passes / run.passes).toFixed(2)} of ${run.seconds.toFixed(2)} s` : "";
    this.facts.textContent = `pass ${whole(passes)} of ${whole(run.passes)} \u00b7 ${whole(this.done[passes])} of ` +
      `${whole(length)} tokens${seconds}`;
    const [low, high] = passes ? this.window[passes - 1] : [0, 0];
    this.kept.style.width = 100 * low / length + "%";
    this.now.style.width = 100 * (Math.min(high, length) - low) / length + "%";
    const computed = `computed so far: ${whole(this.computed[passes])} slots`;
    this.said.textContent = run.cached ? `cache: ${low} of ${length} slots \u00b7 this pass runs ${high - low} \u00b7 ${computed}`
      : `no cache \u00b7 this pass runs ${high - low} slots \u00b7 ${computed}`;
    this.ahead.setAttribute("x", passes);
    this.ahead.setAttribute("width", run.passes - passes);
  }
}

const when = token => token.step < 0 ? "given" : `pass ${token.step + 1}, ${SAID[token.phase] ?? "by " + token.run.decoder}`;
const spoken = token => `position ${token.at}, ${plain(written(token.run.pieces[token.id], token.id))}, ${when(token)}` +
  (token.step < 0 ? "" : `, log p ${nats(token.logp)}, entropy ${nats(token.entropy)}`);

function paint(token) {
  const scale = SCALES[$("shade").value], value = scale.of(token), given = token.step < 0;
  const level = scale.ends.findIndex(end => value >= end);
  token.box.style.setProperty("--q", given ? "0%" : SHADES[level < 0 ? 5 : level]);
  token.box.style.setProperty("--p", given ? "0%" : 100 * token.p + "%");
}

// The time.
const count = runs.reduce((sum, run) => sum + run.samples.length, 0);
const shown = count <= 4 ? runs.flatMap(run => run.samples.map((_, i) => [run, i]))
  : runs.length === 1 ? [0, 1, 2, 3].map(i => [runs[0], i]) : runs.map(run => [run, 0]);
const panels = shown.map(([run, sample]) => new Panel(run, sample));
$("panels").append(...panels.map(panel => panel.root));
const ends = {pass: Math.max(...runs.map(run => run.passes)), seconds: Math.max(...runs.map(run => run.seconds))};
const state = {by: "pass", time: ends.pass, playing: false, last: 0};
if (!runs.every(run => run.seconds > 0)) $("by").hidden = true;
if (!runs.some(run => run.samples.some(sample => sample.phase.includes(0))))
  document.querySelector(".given-key").hidden = true;
document.querySelector(".decided-key").hidden = !runs.some(run => run.decoder);

const passesOf = run => Math.min(run.passes, Math.floor(state.by === "pass" ? state.time
  : state.time / run.seconds * run.passes + 1e-6));
const unit = () => state.by === "pass" ? 1 : Math.min(...runs.map(run => run.seconds / run.passes));

function draw() {
  for (const panel of panels) panel.draw(passesOf(panel.run));
  const end = ends[state.by];
  $("time").max = end;
  $("time").step = state.by === "pass" ? 1 : "any";
  $("time").value = state.time;
  $("clock").textContent = state.by === "pass" ? `pass ${Math.floor(state.time)} of ${end}`
    : `${state.time.toFixed(2)} of ${end.toFixed(2)} s`;
  $("time").setAttribute("aria-valuetext", $("clock").textContent);
  if (card.token) tell(card.token);
}

function go(time) {
  state.time = Math.min(ends[state.by], Math.max(0, time));
  draw();
}

function step(direction) {
  play(false);
  go((Math.round(state.time / unit()) + direction) * unit());
}

function play(on) {
  if (on && state.time >= ends[state.by]) go(0);
  state.playing = on;
  state.last = performance.now();
  $("play").setAttribute("aria-label", on ? "Pause" : "Play");
  if (on) requestAnimationFrame(tick);
}

function tick(now) {
  if (!state.playing) return;
  // At 1x the longest plays for 12 seconds, and no pass for more than a third of one.
  const span = Math.min(12, ends.pass / 3) / Number($("speed").value);
  go(state.time + Math.max(0, now - state.last) / 1000 * ends[state.by] / span);
  state.last = now;
  if (state.time >= ends[state.by]) play(false);
  else requestAnimationFrame(tick);
}

// The card of a token.
const card = {token: null};

function tell(token) {
  card.token = token;
  const {run} = token, box = $("card"), piece = id => written(run.pieces[id], id);
  if (token.phase === LEFT || token.step >= token.panel.passes) {
    const until = token.phase === LEFT ? "left out" : `until pass ${token.step + 1} of ${run.passes}`;
    box.replaceChildren(make("h3", {}, "masked"), make("p", {}, `position ${token.at} \u00b7 ${until}`));
  } else {
    box.replaceChildren(make("h3", {}, ...piece(token.id)),
      make("p", {}, `position ${token.at} \u00b7 ${when(token)}`));
    if (token.step >= 0) box.append(facts(token), table(token, piece));
  }
  box.hidden = false;
  const at = token.box.getClientRects()[0], size = box.getBoundingClientRect(), bottom = innerHeight - 64;
  const below = at.bottom + 8 + size.height < bottom;
  box.style.left = Math.max(8, Math.min(at.left - 14, innerWidth - size.width - 12)) + "px";
  box.style.top = Math.max(8, below ? at.bottom + 8 : at.top - 8 - size.height) + "px";
}

function facts(token) {
  const row = (name, value) => [make("dt", {}, name), make("dd", {}, value)];
  const share = logp => logp === null ? nats(logp) : `${percent(Math.exp(logp))} \u00b7 log p ${nats(logp)}`;
  return make("dl", {}, ...row("probability", share(token.logp)), ...row("under the rule", share(token.rule)),
    ...row("entropy", nats(token.entropy) + " nats"));
}

function table(token, piece) {
  const made = make("table", {}, make("caption", {}, "likeliest here"));
  token.others.forEach((id, i) => {
    const bar = make("span"), logp = token.theirs[i], p = logp === null ? 0 : Math.exp(logp);
    bar.style.width = Math.max(1, 100 * p) + "%";
    made.append(make("tr", id === token.id ? {class: "drawn"} : {}, make("td", {}, ...piece(id)),
      make("td", {class: "share"}, bar), make("td", {}, percent(p))));
  });
  return made;
}

function untell() {
  card.token = null;
  $("card").hidden = true;
}

const tokenOf = node => node.closest?.(".text .t")?.token;
const focused = () => tokenOf(document.activeElement);
$("panels").addEventListener("pointerover", event => {
  const token = tokenOf(event.target);
  if (event.pointerType === "mouse") token ? tell(token) : focused() ? tell(focused()) : untell();
});
$("panels").addEventListener("pointerleave", () => focused() ? tell(focused()) : untell());
$("panels").addEventListener("click", event => tokenOf(event.target)?.box.focus());
$("panels").addEventListener("focusin", event => { const token = tokenOf(event.target); if (token) tell(token); });
$("panels").addEventListener("focusout", untell);
addEventListener("scroll", () => { if (card.token) tell(card.token); }, {passive: true});

// The keys.
function move(token, key) {
  const {tokens} = token.panel, at = token.at;
  let to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1}[key];
  if (key === "ArrowUp" || key === "ArrowDown") {  // the nearest box of the next line
    const here = token.box.getClientRects()[0], down = key === "ArrowDown" ? 1 : -1;
    const places = tokens.map(other => other.box.getClientRects()[0]);
    const line = Math.min(...places.map(place => down * (place.top - here.top)).filter(gap => gap > 4));
    const near = places.map(place => down * (place.top - here.top) - line < 4 && down * (place.top - here.top) > 4
      ? Math.abs(place.left - here.left) : Infinity);
    to = near.indexOf(Math.min(...near));
    if (near[to] === Infinity) return;
  }
  if (!tokens[to]) return;
  token.box.tabIndex = -1;
  tokens[to].box.tabIndex = 0;
  tokens[to].box.focus();
}

addEventListener("keydown", event => {
  const {key, target} = event, token = tokenOf(target);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const own = target.matches?.("select, input, button");
  if (key === "Escape") { token?.box.blur(); untell(); }
  else if (key === ",") step(-1);
  else if (key === ".") step(1);
  else if (key === " " && !own) play(!state.playing);
  else if (token && /^(Arrow|Home|End)/.test(key)) move(token, key);
  else if (!own && key === "ArrowLeft") step(-1);
  else if (!own && key === "ArrowRight") step(1);
  else return;
  event.preventDefault();
});

$("play").onclick = () => play(!state.playing);
$("back").onclick = () => step(-1);
$("next").onclick = () => step(1);
$("time").oninput = () => { play(false); go(state.by === "pass" ? Math.round($("time").value) : Number($("time").value)); };
$("by").onchange = () => {
  const share = state.time / ends[state.by];
  state.by = $("by").value;
  go(share * ends[state.by]);
};
$("shade").onchange = () => {
  const {label} = SCALES[$("shade").value];
  $("scale").replaceChildren(...label.map((text, i) => {
    const item = make("li", {}, text || "\u00a0");
    item.style.background = `color-mix(in oklab, var(--heat) ${SHADES[i]}, var(--sheet))`;
    return item;
  }));
  panels.forEach(panel => panel.tokens.forEach(paint));
};
$("theme").onclick = () => {
  const dark = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = dark === "dark" ? "light" : "dark";
};

// An address may name a moment and a token: #step=5&at=0.12 is the fifth pass, position 12 of the first text.
function follow() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.has("step")) { play(false); $("by").value = state.by = "pass"; go(Number(asked.get("step"))); }
  const [panel, at] = (asked.get("at") ?? "").split(".").map(Number);
  panels[panel]?.tokens[at]?.box.focus();
}

$("shade").onchange();
draw();
addEventListener("hashchange", follow);
follow();
