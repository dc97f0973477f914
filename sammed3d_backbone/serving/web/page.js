// The page of `sammed3d view`. It holds all prompts and sends all of them every time; the server
// answers with the box of the label map that has changed. So undo, redo and a server that was
// started anew need nothing of their own. No request leaves the server that the page came from.
"use strict";

const CONTRASTS = { "soft tissue": [-160, 240], lung: [-1350, 150], bone: [-450, 1050] }; // in HU
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];
const HEARTBEAT_MS = 30_000;
const PROGRESS_MS = 400;
const RETRY_MS = 2_000;
const REST_MS = 250; // in which the crosshair does not move
const TEXTURE_DRAW = 7; // NiiVue's unit for the label map
const THROUGH = [2, 1, 0]; // the axis that an axial, a coronal and a sagittal slice cuts
const NEAR_VOXELS = 1.5; // of the shown slice, within which a click is marked

const $ = (id) => document.getElementById(id);
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const key = keyOfAddress();

let viewer; // NiiVue
let server; // what /page/open answered
let scan; // the hash of the scan that is shown
let crosshair; // in mm
let clicks = []; // { value, positive, point_mm }, in their order
let past = []; // earlier lists of clicks
let future = []; // those taken back
let objects = []; // { value, name, colour, row, hidden, locked, facts }
let selected; // one of them
let isEmpty = true; // whether the label map shown here is that of no prompts at all
let version = 0; // of the prompts
let sent; // the request under way
let saved = 0; // the version that was saved last
let resting; // timer of the crosshair
let encoding; // the request to encode a window ahead

class RefusedError extends Error {}

// --- the server -----------------------------------------------------------------------------

function keyOfAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given !== null) {
    sessionStorage.setItem("key", given); // so that the page can be loaded again
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem("key");
}

function ask(path, body, keepalive = false) {
  const headers = {};
  if (key) headers["Authorization"] = `Bearer ${key}`;
  if (server) headers["X-Lease-Token"] = server.lease;
  const how = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  return fetch(path, { ...how, headers, keepalive, cache: "no-store" });
}

// The answer, however long the server is away; `body` is a function because it may change meanwhile.
async function answer(path, body = () => undefined) {
  for (;;) {
    let reply, content;
    try {
      reply = await ask(path, body());
      content = await reply.arrayBuffer();
    } catch {
      isEmpty = true; // an answer may be lost, so the next one has to hold everything
      warn("The server does not answer. Your clicks are kept, and sent again when it is back.");
      await pause(RETRY_MS);
      continue;
    }
    if (reply.ok) {
      warn("");
      return { headers: reply.headers, content };
    }
    const { detail } = parsed(content);
    if (reply.status === 410) {
      await open();
    } else if (reply.status === 503) {
      warn(`The server says: ${detail}.`);
      await pause(RETRY_MS);
    } else {
      throw new RefusedError(detail);
    }
  }
}

function parsed(content) {
  return JSON.parse(new TextDecoder().decode(content));
}

async function open() {
  server = undefined;
  const max_side = viewer.gl.getParameter(viewer.gl.MAX_3D_TEXTURE_SIZE);
  const opened = parsed((await answer("page/open", () => ({ max_side }))).content);
  scan ??= opened.scan;
  if (scan !== opened.scan) {
    throw new RefusedError("the server shows another scan now; load the page again");
  }
  server = opened;
  isEmpty = true;
}

// --- prompts --------------------------------------------------------------------------------

function click(positive) {
  if (!crosshair || !selected) return;
  change([...clicks, { value: selected.value, positive, point_mm: crosshair }]);
}

function change(next) {
  past.push(clicks);
  future = [];
  clicks = next;
  update();
}

function undo() {
  if (!past.length) return;
  future.push(clicks);
  clicks = past.pop();
  update();
}

function redo() {
  if (!future.length) return;
  past.push(clicks);
  clicks = future.pop();
  update();
}

// Sends the prompts; what changes while a request is under way goes with the next one.
function update() {
  version += 1;
  listObjects();
  sent ??= send()
    .catch(fail)
    .finally(() => (sent = undefined));
  return sent;
}

function prompts() {
  return {
    clicks,
    names: Object.fromEntries(objects.map(({ value, name }) => [value, name])),
    locked: objects.filter(({ locked }) => locked).map(({ value }) => value),
    follow: $("follow").checked,
    is_empty: isEmpty,
  };
}

async function send() {
  $("busy").hidden = false;
  const timer = setInterval(showProgress, PROGRESS_MS);
  const began = performance.now();
  try {
    for (let current; current !== version; ) {
      current = version;
      const { headers, content } = await answer("page/prompts", prompts);
      const meta = JSON.parse(headers.get("X-Meta"));
      const answered = performance.now();
      show(meta.box, new Uint8Array(content));
      await drawn();
      report(meta, answered - began, performance.now() - answered);
    }
  } finally {
    clearInterval(timer);
    $("busy").hidden = true;
    $("progress").textContent = "";
  }

  async function showProgress() {
    const seconds = ((performance.now() - began) / 1000).toFixed(0);
    const reply = await ask("page/progress").catch(() => undefined);
    if (!reply?.ok) return;
    const { windows } = await reply.json();
    if ($("busy").hidden) return;
    $("progress").textContent = `${seconds} s, ${windows} windows of the scan are encoded`;
  }
}

function fail(error) {
  if (!(error instanceof RefusedError)) console.error(error);
  warn(`${error.message[0].toUpperCase()}${error.message.slice(1)}.`);
}

// --- the label map --------------------------------------------------------------------------

// Writes a box of labels, x fastest, into NiiVue's drawing, and only the box onto the graphics card.
function show(box, labels) {
  const [nx, ny] = viewer.back.dimsRAS.slice(1);
  if (isEmpty) viewer.drawBitmap.fill(0);
  if (box) {
    const [[x, endX], [y, endY], [z, endZ]] = box;
    const width = endX - x;
    for (let from = 0, k = z; k < endZ; k++) {
      for (let j = y; j < endY; j++, from += width) {
        viewer.drawBitmap.set(labels.subarray(from, from + width), x + nx * (j + ny * k));
      }
    }
  }
  if (isEmpty) {
    viewer.refreshDrawing(false);
  } else if (labels.length) {
    const gl = viewer.gl;
    const [[x, endX], [y, endY], [z, endZ]] = box;
    const size = [endX - x, endY - y, endZ - z];
    gl.activeTexture(gl.TEXTURE0 + TEXTURE_DRAW);
    gl.bindTexture(gl.TEXTURE_3D, viewer.drawTexture);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    gl.texSubImage3D(gl.TEXTURE_3D, 0, x, y, z, ...size, gl.RED, gl.UNSIGNED_BYTE, labels);
  }
  isEmpty = false;
  viewer.drawScene();
}

function drawn() {
  return new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
}

function paintColours() {
  const lut = new Uint8ClampedArray(256 * 4);
  for (const { value, colour, hidden } of objects) {
    const rgb = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    lut.set([...rgb, hidden ? 0 : 255], 4 * value);
  }
  viewer.drawLut = { lut, labels: Array.from({ length: 256 }, () => "") };
  viewer.refreshColormaps();
  viewer.drawScene();
}

// --- what is said ---------------------------------------------------------------------------

function warn(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function tell(text) {
  $("status").textContent = text;
}

function report(meta, answerMs, drawMs) {
  for (const object of objects) object.facts = meta.objects[object.value];
  const seconds = [answerMs, drawMs].map((ms) => (ms / 1000).toFixed(2));
  tell(`Answered in ${seconds[0]} s, shown ${seconds[1]} s later.`);
  $("notes").replaceChildren(
    ...meta.notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })),
  );
  listObjects();
}

function place({ mm, values }) {
  crosshair = Array.from(mm).slice(0, 3);
  const [x, y, z] = crosshair.map((n) => n.toFixed(1));
  const value = values[0].value;
  const shown = Number.isInteger(value) ? value : value.toPrecision(4);
  $("place").textContent = `R ${x}  A ${y}  S ${z} mm, value ${shown}`;
  clearTimeout(resting);
  resting = setTimeout(encodeAhead, REST_MS);
}

// Has the window around the crosshair encoded, so that a click there is answered sooner.
function encodeAhead() {
  if (sent || encoding) return;
  encoding = ask("page/place", { point_mm: crosshair })
    .catch(() => undefined)
    .finally(() => (encoding = undefined));
}

// Marks the clicks near the shown slices, those on the selected object above the others.
function markClicks() {
  const { crosshairPos } = viewer.scene;
  const marks = [];
  for (const { value, positive, point_mm } of clicks) {
    const object = objects.find((one) => one.value === value);
    for (const [kind, axis] of object.hidden ? [] : THROUGH.entries()) {
      const place = viewer.mm2frac(point_mm, 0, true);
      const voxels = (place[axis] - crosshairPos[axis]) * viewer.back.dimsRAS[axis + 1];
      if (Math.abs(voxels) > NEAR_VOXELS) continue;
      place[axis] = crosshairPos[axis];
      const { pos } = viewer.frac2canvasPosWithTile(place, kind) ?? {};
      if (!pos) continue;
      const mark = document.createElement("span");
      mark.className = positive ? "positive" : "negative";
      mark.classList.toggle("selected", object === selected);
      mark.style.color = object.colour;
      [mark.style.left, mark.style.top] = pos.map((at) => `${at / viewer.uiData.dpr}px`);
      marks.push(mark);
    }
  }
  $("marks").replaceChildren(...marks);
}

// --- objects --------------------------------------------------------------------------------

function addObject(value) {
  if (value > 255) return warn("A label map holds 255 objects.");
  const object = { value, name: `object ${value}`, colour: colourOf(value) };
  object.row = rowOf(object);
  objects.push(object);
  $("objects").append(object.row);
  select(object);
  paintColours();
}

function colourOf(value) {
  if (value <= COLOURS.length) return COLOURS[value - 1];
  const turn = value * 0.618; // of the colour wheel; neighbours in the list are far apart
  const parts = [0, 1, 2].map((n) => 160 + 95 * Math.cos(2 * Math.PI * (turn + n / 3)));
  return `#${parts.map((part) => Math.round(part).toString(16).padStart(2, "0")).join("")}`;
}

function rowOf(object) {
  const row = $("object").content.cloneNode(true).firstElementChild;
  const find = (query) => row.querySelector(query);
  const [radio, colour, name] = ["[type=radio]", "[type=color]", ".name"].map(find);
  radio.onchange = () => select(object);
  row.onclick = () => select(object);
  colour.value = object.colour;
  colour.oninput = () => {
    object.colour = colour.value;
    paintColours();
  };
  name.value = object.name;
  name.oninput = () => {
    object.name = name.value;
    describe();
  };
  find(".hide").onchange = (event) => {
    object.hidden = event.target.checked;
    paintColours();
  };
  find(".lock").onchange = (event) => {
    object.locked = event.target.checked;
    update();
  };
  find(".reset").onclick = () => change(clicks.filter(({ value }) => value !== object.value));
  describe();
  return row;

  function describe() {
    radio.setAttribute("aria-label", `Click on ${object.name}`);
    colour.setAttribute("aria-label", `Colour of ${object.name}`);
    name.setAttribute("aria-label", `Name of ${object.name}`);
    find(".reset").setAttribute("aria-label", `Drop the clicks on ${object.name}`);
  }
}

function select(object) {
  selected = object;
  listObjects();
}

function listObjects() {
  for (const object of objects) {
    const own = clicks.filter(({ value }) => value === object.value);
    const inside = own.filter(({ positive }) => positive).length;
    const ml = object.facts ? `${object.facts.ml.toFixed(1)} ml` : "";
    const counts = own.length ? `+${inside} \u2212${own.length - inside}` : "";
    const dice = object.facts?.predicted_dice;  // only where the weights are calibrated
    const expected = dice == null ? "" : `Dice about ${dice.toFixed(2)}`;
    object.row.querySelector(".facts").textContent =
      [counts, ml, expected].filter(Boolean).join(", ");
    object.row.querySelector("[type=radio]").checked = object === selected;
    object.row.querySelector(".reset").disabled = !own.length;
    object.row.classList.toggle("selected", object === selected);
  }
  markClicks();
  $("undo").disabled = !past.length;
  $("redo").disabled = !future.length;
}

// --- saving ---------------------------------------------------------------------------------

async function save(path, name) {
  const current = version;
  try {
    const { content } = await answer(path, prompts);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content]));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), HEARTBEAT_MS);
    saved = current;
    tell(`Saved ${name} to the browser's downloads.`);
  } catch (error) {
    fail(error);
  }
}

// --- display --------------------------------------------------------------------------------

function setContrast(name) {
  const volume = viewer.volumes[0];
  [volume.cal_min, volume.cal_max] = CONTRASTS[name] ?? [volume.robust_min, volume.robust_max];
  viewer.updateGLVolume();
}

function setRendering(isShown) {
  const { ALWAYS, NEVER } = niivue.SHOW_RENDER;
  viewer.opts.multiplanarShowRender = isShown ? ALWAYS : NEVER;
  viewer.drawScene();
}

// Without a graphics card the rendering takes ten times as long as the three slices.
function hasGraphicsCard() {
  const info = viewer.gl.getExtension("WEBGL_debug_renderer_info");
  const name = info ? viewer.gl.getParameter(info.UNMASKED_RENDERER_WEBGL) : "";
  return !/swiftshader|llvmpipe|software/i.test(name);
}

// --- start ----------------------------------------------------------------------------------

const KEYS = {
  p: () => click(true),
  n: () => click(false),
  u: undo,
  r: redo,
  o: () => $("add").click(),
  ArrowLeft: (step) => viewer.moveCrosshairInVox(-step, 0, 0),
  ArrowRight: (step) => viewer.moveCrosshairInVox(step, 0, 0),
  ArrowDown: (step) => viewer.moveCrosshairInVox(0, -step, 0),
  ArrowUp: (step) => viewer.moveCrosshairInVox(0, step, 0),
  PageDown: (step) => viewer.moveCrosshairInVox(0, 0, -step),
  PageUp: (step) => viewer.moveCrosshairInVox(0, 0, step),
};

function onKey(event) {
  const canvas = event.target === $("views");
  if (canvas) event.stopPropagation(); // NiiVue has keys of its own
  if (event.type === "keyup" || event.altKey || event.metaKey) return;
  if (event.target.matches("[type=text], select")) return;
  let act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (event.ctrlKey) act = { z: event.shiftKey ? redo : undo, y: redo }[event.key.toLowerCase()];
  else if (event.key.length > 1 && !canvas) return; // arrows belong to sliders and lists
  if (!act || !server) return;
  event.preventDefault();
  act(event.shiftKey ? 10 : 1);
}

function connect() {
  $("inside").onclick = () => click(true);
  $("outside").onclick = () => click(false);
  $("undo").onclick = undo;
  $("redo").onclick = redo;
  $("follow").onchange = update;
  $("add").onclick = () => addObject(Math.max(...objects.map(({ value }) => value)) + 1);
  $("opacity").oninput = (event) => viewer.setDrawOpacity(event.target.valueAsNumber);
  $("contrast").onchange = (event) => setContrast(event.target.value);
  $("rendering").onchange = (event) => setRendering(event.target.checked);
  $("save-labels").onclick = () => save("page/labels", `${document.title}_labels.nii.gz`);
  $("save-dicom").onclick = () => save("page/dicom-seg", `${document.title}_labels.dcm`);
  $("save-clicks").onclick = () => save("page/clicks", `${document.title}_clicks.json`);
  for (const type of ["keydown", "keyup"]) document.addEventListener(type, onKey, true);
  setInterval(() => sent ?? ask("page/progress").catch(() => undefined), HEARTBEAT_MS);
  addEventListener("beforeunload", (event) => version !== saved && event.preventDefault());
  addEventListener("pagehide", () => ask("page/close", {}, true));
}

async function start() {
  if (!document.createElement("canvas").getContext("webgl2")) {
    return warn("This browser has no WebGL2, which the page needs; try another, or its settings.");
  }
  const { Niivue, MULTIPLANAR_TYPE, DRAG_MODE } = niivue;
  viewer = new Niivue({
    logLevel: "error",
    loadingText: "",
    dragAndDropEnabled: false,
    crosshairColor: [0.36, 0.78, 1, 0.7],
    crosshairWidthUnit: "percent",
    crosshairWidth: 0.3,
    isRadiologicalConvention: true, // the right of the body on the left of the screen
    sagittalNoseLeft: true,
    isForceMouseClickToVoxelCenters: true,
    multiplanarLayout: MULTIPLANAR_TYPE.GRID,
  });
  viewer.setMouseEventConfig({
    leftButton: { primary: DRAG_MODE.crosshair },
    rightButton: DRAG_MODE.windowing,
    centerButton: DRAG_MODE.pan,
  });
  viewer.onLocationChange = place;
  const draw = viewer.drawScene.bind(viewer);
  viewer.drawScene = () => {
    draw();
    markClicks();
  };
  await viewer.attachToCanvas($("views"));
  setRendering(($("rendering").checked = hasGraphicsCard()));
  tell("Loading the scan.");
  await open();
  $("scan").textContent = document.title = server.name;
  $("save-dicom").hidden = !server.is_dicom;
  const { shape, step, weights } = server;
  const nth = { 2: "2nd", 3: "3rd" }[step] ?? `${step}th`;
  const reduced = step > 1 ? ` (every ${nth} is shown)` : "";
  $("about").textContent = `${shape.join(" \u00d7 ")} voxels${reduced}, weights ${weights}`;
  await viewer.loadFromArrayBuffer((await answer("page/scan")).content, "scan.nii");
  viewer.setSliceType(viewer.sliceTypeMultiplanar);
  viewer.createEmptyDrawing();
  viewer.setDrawOpacity($("opacity").valueAsNumber);
  for (const name of ["automatic", ...Object.keys(CONTRASTS)]) $("contrast").add(new Option(name));
  $("contrast").value = server.modality === "ct" ? "soft tissue" : "automatic";
  setContrast($("contrast").value);
  $("follow").checked = server.follow;
  for (const value of Object.keys(server.objects)) addObject(Number(value));
  if (!objects.length) addObject(1);
  connect();
  viewer.moveCrosshairInVox(0, 0, 0); // to the centre of a voxel, and says where
  await update();
  saved = version;
  if (step > 1) {
    warn(`The scan is too large to show: every ${nth} voxel is shown, all are segmented.`);
  }
  tell("Place the crosshair in the middle of an object, not on its first or last slice; press p.");
  $("views").focus();
}

start().catch(fail);
