// A list that holds only what is on the screen, in as many columns as fit: thousands of entries stay smooth.

/**
 * @param {number} total entries
 * @param {{height: number, minWidth: number, gap?: number, label: string, render: (at: number) => Element}} options
 *   `render` makes the content of entry `at`; every entry is `height` pixels high.
 */
function virtualList(total, { height, minWidth, gap = 14, label, render }) {
  const list = h("div", { class: "virtual", role: "list", "aria-label": label });
  const shown = new Map();
  let columns = 0,
    everything = false,
    queued = false;

  function draw() {
    queued = false;
    if (!list.isConnected) return;
    const width = list.clientWidth;
    const now = Math.max(1, Math.floor((width + gap) / (minWidth + gap)));
    if (now !== columns) {
      columns = now;
      list.style.setProperty("--columns", columns);
      for (const element of shown.values()) element.remove();
      shown.clear();
    }
    const rows = Math.ceil(total / columns),
      step = height + gap,
      box = list.getBoundingClientRect();
    list.style.height = `${Math.max(0, rows * step - gap)}px`;
    const first = everything ? 0 : Math.max(0, Math.floor((-box.top - 400) / step));
    const last = everything ? rows : Math.min(rows, Math.ceil((innerHeight - box.top + 400) / step));
    const from = first * columns,
      to = Math.min(total, last * columns);
    for (const [at, element] of shown) {
      if ((at < from || at >= to) && !element.contains(document.activeElement)) {
        element.remove();
        shown.delete(at);
      }
    }
    const columnWidth = (width - gap * (columns - 1)) / columns;
    for (let at = from; at < to; at++) {
      let element = shown.get(at);
      if (!element) {
        element = h(
          "div",
          {
            class: "cell",
            role: "listitem",
            "aria-setsize": total,
            "aria-posinset": at + 1,
            style: { height: `${height}px` },
          },
          render(at),
        );
        shown.set(at, element);
        const next = [...list.children].find((child) => Number(child.getAttribute("aria-posinset")) > at + 1);
        list.insertBefore(element, next ?? null);
      }
      element.style.width = `${columnWidth}px`;
      element.style.transform = `translate(${(at % columns) * (columnWidth + gap)}px, ${Math.floor(at / columns) * step}px)`;
    }
  }
  const later = () => {
    if (!queued) {
      queued = true;
      requestAnimationFrame(draw);
    }
  };
  const whenPrinted = (on) => {
    everything = on && total <= 1000;
    draw();
  };

  addEventListener("scroll", later, { passive: true, signal: viewSignal() });
  addEventListener("resize", later, { signal: viewSignal() });
  addEventListener("beforeprint", () => whenPrinted(true), { signal: viewSignal() });
  addEventListener("afterprint", () => whenPrinted(false), { signal: viewSignal() });
  later();
  return {
    element: list,
    reset(newTotal) {
      total = newTotal;
      for (const element of shown.values()) element.remove();
      shown.clear();
      draw();
    },
  };
}
