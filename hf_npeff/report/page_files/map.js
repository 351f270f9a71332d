// All examples on a plane, near where they mix components alike.

const mapState = { colour: null, zoom: 1, x: 0, y: 0 };

/** How the points are coloured: a colour for each example, and a key. */
function mapColours(choice) {
  if (choice.startsWith("component/")) {
    const j = Number(choice.slice(10)),
      largest = largestOf(
        topFew(j).map((i) => stored(j)[i]),
        1,
      );
    return {
      of: (i) => rgb(viridis(stored(j)[i] / largest)),
      key: viridisKey("0", number(largest * scaleOf(j))),
      label: (i) => `coefficient ${number(coefficient(j, i))}`,
      front: (i) => stored(j)[i],
    };
  }
  const at = Number(choice.slice(7)),
    column = facts.columns[at],
    data = arrays[`column/${at}`];
  if (column.kind === "number") {
    const low = smallestOf(data),
      high = largestOf(data, -Infinity); // NaN compares as neither
    return {
      of: (i) => (Number.isNaN(data[i]) ? OTHERS : rgb(viridis((data[i] - low) / (high - low || 1)))),
      key: viridisKey(number(low), number(high)),
      label: (i) => `${column.name}: ${valueOf(at, i) ?? "–"}`,
      front: () => 0,
    };
  }
  const counts = new Map();
  for (const code of data) counts.set(code, (counts.get(code) ?? 0) + 1);
  const order = [...counts.keys()]
    .filter((code) => column.values[code] !== null)
    .sort((a, b) => counts.get(b) - counts.get(a) || a - b);
  const colours = new Map(order.slice(0, order.length > 8 ? 7 : 8).map((code, at_) => [code, OKABE_ITO[at_]]));
  const key = h(
    "ul",
    { class: "key" },
    [...colours].map(([code, colour]) =>
      h("li", {}, h("i", { style: { background: colour } }), isolated(line(visible(column.values[code]), 30) || "␣")),
    ),
    colours.size < counts.size
      ? h("li", {}, h("i", { style: { background: OTHERS } }), `${plural(counts.size - colours.size, "other value")}`)
      : null,
  );
  return {
    of: (i) => colours.get(data[i]) ?? OTHERS,
    key,
    label: (i) => `${column.name}: ${valueOf(at, i) ?? "–"}`,
    front: (i) => (colours.has(data[i]) ? 1 : 0),
  };
}

function mapView() {
  const xy = arrays.xy,
    choices = [
      ...colourable().map((c) => [`column/${c.at}`, c.name]),
      ...facts.components.map((c) => [`component/${c.index}`, labelOf(c.index)]),
    ];
  const preferred = overviewState.column === null ? choices[0][0] : `column/${overviewState.column}`;
  mapState.colour ??= choices.some(([key]) => key === preferred) ? preferred : choices[0][0];
  const canvas = h("canvas", {
    class: "map",
    tabindex: "0",
    role: "img",
    "aria-label": `Map of ${plural(n, "example")}; the list of examples holds the same`,
  });
  const keyBox = h("div", { class: "mapkey" });
  let colours = mapColours(mapState.colour),
    width = 1,
    height = 1,
    hovered = -1;

  const place = (i) => {
    const { zoom, x, y } = mapState;
    return [
      width / 2 + (xy[2 * i] / 65535 - 0.5 - x) * (width - 32) * zoom,
      height / 2 + (xy[2 * i + 1] / 65535 - 0.5 - y) * (height - 32) * zoom,
    ];
  };
  function draw() {
    if (!canvas.isConnected) return;
    const ratio = devicePixelRatio || 1;
    width = canvas.parentElement.clientWidth - 24;
    height = Math.max(320, Math.min(width, innerHeight - 290));
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const radius = Math.max(2, Math.min(6, 90 / Math.sqrt(n))) * Math.sqrt(mapState.zoom),
      edge = themeColour("edge");
    const order = Array.from({ length: n }, (_, i) => i).sort((a, b) => colours.front(a) - colours.front(b) || a - b);
    context.lineWidth = 0.7;
    context.strokeStyle = edge;
    for (const i of order) {
      const [x, y] = place(i);
      if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
      context.fillStyle = colours.of(i);
      context.beginPath();
      context.arc(x, y, i === hovered ? radius + 3 : radius, 0, 7);
      context.fill();
      context.stroke();
    }
  }
  function nearest(event) {
    const box = canvas.getBoundingClientRect(),
      px = event.clientX - box.left,
      py = event.clientY - box.top;
    let best = -1,
      least = 14 ** 2;
    for (let i = 0; i < n; i++) {
      const [x, y] = place(i),
        distance = (x - px) ** 2 + (y - py) ** 2;
      if (distance < least) {
        least = distance;
        best = i;
      }
    }
    return best;
  }
  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, y: event.clientY, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) {
      const dx = event.clientX - drag.x,
        dy = event.clientY - drag.y;
      if (Math.hypot(dx, dy) > 3 || drag.moved) {
        mapState.x -= dx / ((width - 32) * mapState.zoom);
        mapState.y -= dy / ((height - 32) * mapState.zoom);
        drag = { x: event.clientX, y: event.clientY, moved: true };
        requestAnimationFrame(draw);
      }
      return;
    }
    const i = nearest(event);
    if (i !== hovered) {
      hovered = i;
      requestAnimationFrame(draw);
    }
    canvas.style.cursor = i < 0 ? "grab" : "pointer";
    if (i < 0) return hideTip();
    showTip(event, snippet(i, 120), isolated(line(colours.label(i), 80)));
  });
  canvas.addEventListener("pointerup", (event) => {
    const moved = drag?.moved;
    drag = null;
    const i = nearest(event);
    if (!moved && i >= 0) {
      hideTip();
      location.hash = `#/example/${i}`;
    }
  });
  canvas.addEventListener("pointerleave", () => {
    hovered = -1;
    hideTip();
    requestAnimationFrame(draw);
  });
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return; // a wheel alone scrolls the page; pinching a touchpad counts as Ctrl
      event.preventDefault();
      zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2);
    },
    { passive: false },
  );
  canvas.addEventListener("keydown", (event) => {
    const step = 0.1 / mapState.zoom,
      moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key === "+" || event.key === "-") zoom(event.key === "+" ? 1.4 : 1 / 1.4);
    else if (moves[event.key]) {
      mapState.x += moves[event.key][0];
      mapState.y += moves[event.key][1];
      draw();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  function zoom(factor) {
    mapState.zoom = Math.max(1, Math.min(40, mapState.zoom * factor));
    if (mapState.zoom === 1) mapState.x = mapState.y = 0;
    draw();
  }
  addEventListener("resize", () => requestAnimationFrame(draw), { signal: viewSignal() });
  const recolour = (choice) => {
    mapState.colour = choice;
    colours = mapColours(choice);
    clear(keyBox, colours.key);
    draw();
  };
  clear(
    main,
    h(
      "div",
      { class: "hero" },
      h("h1", {}, "Map of examples"),
      h(
        "p",
        { class: "lead" },
        `Examples with similar mixtures of components lie close together (${facts.layout}). Large distances mean little.`,
      ),
    ),
    h(
      "div",
      { class: "controls" },
      select(
        "Colour by",
        choices.map(([key, name]) => [key, key.startsWith("component") ? `${key.slice(10)} · ${name}` : name]),
        mapState.colour,
        recolour,
      ),
      h("button", { type: "button", class: "quiet", onclick: () => zoom(1.4) }, "Zoom in"),
      h("button", { type: "button", class: "quiet", onclick: () => zoom(1 / 1.4) }, "Zoom out"),
    ),
    h("div", { class: "mapbox" }, h("div", { class: "panel tight" }, canvas), keyBox),
  );
  recolour(mapState.colour);
}
