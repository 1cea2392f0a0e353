// What the page does by itself: stopwatches that run between two messages of the server, and the export of charts
// as PNG and SVG in the visitor's own browser (no program is needed on the server for it).
window.bakeoff = (() => {
  const LIBRARY = 'assets/plotly.min.js'; // from our own server, and only when somebody exports
  let library = null;

  function loadLibrary() {
    library ??= new Promise((resolve, reject) => {
      const script = document.createElement('script');
      script.src = LIBRARY;
      script.onload = resolve;
      script.onerror = () => { library = null; reject(new Error('The plotting library could not be loaded.')); };
      document.head.append(script);
    });
    return library;
  }

  // `name` is the run's id. The picture is drawn on white with dark text, whatever the page looks like.
  async function exportChart(chartId, format, name) {
    const chart = document.querySelector(`#${chartId} .js-plotly-plot`);
    if (!chart) return;
    await loadLibrary();
    const layout = { ...chart.layout, paper_bgcolor: 'white', plot_bgcolor: 'white', autosize: false,
      font: { ...chart.layout.font, color: '#1f2937' } };
    layout.annotations = (layout.annotations || []).map(note => ({ ...note, font: { ...note.font, color: '#374151' } }));
    const picture = { data: chart.data, layout };
    const size = { width: 1200, height: chart.layout.height || 540 };
    const url = await Plotly.toImage(picture, { format, ...size, scale: format === 'png' ? 2 : 1 });
    const link = document.createElement('a');
    link.href = url;
    link.download = `${name || 'bake-off'}.${format}`;
    document.body.append(link);
    link.click();
    link.remove();
  }

  function words(seconds) {
    const whole = Math.floor(seconds);
    return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
  }

  // data-elapsed: seconds that had passed when the server wrote the element; we add what has passed since.
  const seen = new WeakMap();
  setInterval(() => {
    for (const element of document.querySelectorAll('[data-elapsed]')) {
      const written = element.dataset.elapsed;
      if (seen.get(element)?.written !== written) seen.set(element, { written, at: performance.now() });
      const { at } = seen.get(element);
      const shown = words(Number(written) + (performance.now() - at) / 1000);
      if (element.textContent !== shown) element.textContent = shown;
    }
  }, 250);

  return { exportChart };
})();
