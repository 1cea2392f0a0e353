// What the page does by itself: stopwatches that run between two messages of the server, the recorded race that plays
// when it opens, charts that are asked for when they come into sight, and their export as PNG and SVG in the visitor's
// own browser (no program is needed on the server for it).
window.bakeoff = (() => {
  const LIBRARY = 'assets/plotly.min.js'; // from our own server, and only when somebody exports
  const TERMS = /*TERMS*/{}; // metric -> its tooltip, and how it is written
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

  // `name` is the run's id. The picture is drawn on white with dark text, whatever the page looks like, and has the
  // small print in it that the page shows as a paragraph.
  async function exportChart(chartId, format, name) {
    const chart = document.querySelector(`#${chartId} .js-plotly-plot`);
    if (!chart) return;
    await loadLibrary();
    const print = chart.layout.meta?.small_print;
    const layout = { ...chart.layout, paper_bgcolor: 'white', plot_bgcolor: 'white', autosize: false,
      font: { ...chart.layout.font, color: '#1f2937' } };
    if (print) layout.margin = { ...layout.margin, b: print.bottom };
    layout.annotations = [...(layout.annotations || []), ...(print?.lines || [])]
      .map(note => ({ ...note, font: { ...note.font, color: '#374151' } }));
    const picture = { data: chart.data, layout };
    const size = { width: 1200, height: print?.height || chart.layout.height || 540 };
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
  function moveStopwatches() {
    for (const element of document.querySelectorAll('[data-elapsed]')) {
      const written = element.dataset.elapsed;
      if (seen.get(element)?.written !== written) seen.set(element, { written, at: performance.now() });
      const { at } = seen.get(element);
      const shown = words(Number(written) + (performance.now() - at) / 1000);
      if (element.textContent !== shown) element.textContent = shown;
    }
  }

  // data-charts: a result whose charts the server keeps until they are looked for; they bring the plotting library.
  function askForCharts() {
    for (const sentence of document.querySelectorAll('[data-charts]')) {
      const { bottom, height } = sentence.getBoundingClientRect();
      if (!height || bottom + 80 > window.innerHeight) continue;
      const button = document.getElementById(`${sentence.dataset.charts}-draw`);
      if (!button) continue;
      delete sentence.dataset.charts;
      button.click();
    }
  }

  // Gradio lets every chat announce each piece of text as it comes; three streams at once are noise. What has happened
  // is said once, in the progress line and in the result's sentence.
  function quieten() {
    for (const log of document.querySelectorAll('.answer [aria-live]:not([aria-live="off"])')) log.setAttribute('aria-live', 'off');
    for (const empty of document.querySelectorAll('.empty[aria-label]:not([role])')) empty.setAttribute('role', 'img'); // a chart to come
    for (const box of document.querySelectorAll('.table-scroll:not([tabindex]), .answer .bubble-wrap:not([tabindex])')) {
      box.tabIndex = 0; // what scrolls can be reached and scrolled by keyboard
      if (!box.getAttribute('role')) box.setAttribute('role', 'group');
      if (!box.getAttribute('aria-label')) box.setAttribute('aria-label', box.matches('.table-scroll') ? 'Table of results' : 'Answer');
    }
  }

  // The lights, asked for once a second and written into every lane's head; one that a tab has just brought is written
  // anew. What the server sends there is markup that it has made itself, of words that it has escaped.
  const lights = { version: '', heads: {} };
  async function lookAtLights() {
    if (!document.hidden) {
      try {
        const answer = await fetch(`lights.json?since=${lights.version}`);
        if (answer.status === 200) Object.assign(lights, await answer.json());
      } catch { /* the page has lost its server, and Gradio says so */ }
      showLights();
    }
    setTimeout(lookAtLights, 1000);
  }

  const headsShown = new WeakMap(); // a lane's head -> what stands in it
  function showLights() {
    for (const [name, html] of Object.entries(lights.heads)) {
      for (const head of document.querySelectorAll(`[id$="-head-${name}"] .lane-head`)) {
        if (headsShown.get(head) === html) continue;
        const made = document.createElement('template');
        made.innerHTML = html;
        head.replaceChildren(...made.content.firstElementChild.childNodes);
        headsShown.set(head, html);
      }
    }
  }

  setInterval(() => { moveStopwatches(); askForCharts(); showLights(); }, 250);
  lookAtLights();
  // As it comes, so that nobody who uses the page without seeing it meets it before it is mended.
  new MutationObserver(changes => { if (changes.some(change => [...change.addedNodes].some(node => node.nodeType === 1))) quieten(); })
    .observe(document.documentElement, { childList: true, subtree: true });

  document.addEventListener('pointerover', event => {
    const tile = event.target.closest?.('.tile:not([title])');
    if (tile) tile.title = TERMS[tile.dataset.metric]?.title || '';
  });

  // The recorded race. It lies over the lanes of the first tab and touches nothing below it: taking it away leaves what
  // the server has written there. Everything in it is set as text, never as markup.
  const race = (() => {
    const ROUND_PAUSE = 1500; // ms between two repeats
    const FIGURES = 250; // ms between two updates of the tiles
    const PATIENCE = 60000; // ms for the page to be there; the recorded engines may be none of its lanes
    let playing = null;

    function element(kind, name, text = '') {
      const made = document.createElement(kind);
      made.className = name;
      made.textContent = text;
      return made;
    }

    function written(metric, value) {
      const { scale, digits } = TERMS[metric];
      const style = { minimumFractionDigits: digits, maximumFractionDigits: digits };
      return value === null ? '–' : (value * scale).toLocaleString('en-US', style);
    }

    function lay(name, prompt) {
      const chat = document.getElementById(`baseline-chat-${name}`);
      const tiles = document.querySelector(`#baseline-tiles-${name} .tiles`);
      if (!chat || !tiles) return null;
      const answer = element('div', 'opening-answer');
      const said = element('div', 'said');
      const text = document.createTextNode('');
      said.append(text);
      answer.append(element('div', 'asked', prompt), said);
      const head = document.querySelector(`#baseline-head-${name} .lane-head`);
      answer.style.setProperty('--engine', head?.style.getPropertyValue('--engine') || 'currentColor');
      answer.setAttribute('aria-hidden', 'true'); // its end stands below it, to be read
      const cover = tiles.cloneNode(true);
      cover.className = 'tiles opening-tiles';
      cover.setAttribute('aria-hidden', 'true');
      return { name, chat, answer, text, cover, drawn: -FIGURES };
    }

    function figures(lane, arrivals, count) {
      const values = { ttft: null, decode_speed: null, tpot: null, output_tokens: null, e2e: null };
      if (count) {
        const [first, , firstTokens] = arrivals[0];
        const last = arrivals[count - 1][0];
        const tokens = arrivals.slice(0, count).reduce((sum, one) => sum + one[2], 0);
        values.ttft = first / 1000;
        values.e2e = last / 1000;
        values.output_tokens = tokens;
        if (tokens > firstTokens && last > first) {
          values.tpot = (last - first) / 1000 / (tokens - firstTokens);
          values.decode_speed = 1 / values.tpot;
        }
      }
      for (const [metric, value] of Object.entries(values)) {
        const place = lane.cover.querySelector(`[data-metric="${metric}"] .value`);
        if (place) place.textContent = written(metric, value);
      }
    }

    function begin(recorded, round, bar) {
      const arrivals = recorded.rounds[round];
      playing = { recorded, round, bar, began: performance.now(), lanes: [], arrivals };
      for (const name of Object.keys(arrivals)) {
        const lane = lay(name, recorded.prompt);
        if (lane) playing.lanes.push({ ...lane, count: 0 });
      }
      if (!playing.lanes.length) return stop();
      step(performance.now());
    }

    function step(now) {
      if (!playing) return;
      const { recorded, round, bar, lanes, arrivals, began } = playing;
      if (!bar.isConnected) document.getElementById('baseline-progress')?.after(bar);
      const passed = now - began;
      let left = false;
      for (const lane of lanes) {
        // Gradio may write a lane anew while the page still fills; a lane that is gone belongs to a tab that is gone.
        if (!lane.chat.isConnected) lane.chat = document.getElementById(`baseline-chat-${lane.name}`);
        if (!lane.chat) return stop();
        const tiles = document.querySelector(`#baseline-tiles-${lane.name} .tiles:not(.opening-tiles)`);
        if (!lane.answer.isConnected) lane.chat.append(lane.answer);
        if (tiles && lane.cover.parentElement !== tiles) tiles.append(lane.cover);
        const due = arrivals[lane.name];
        let grown = '';
        while (lane.count < due.length && due[lane.count][0] <= passed) grown += due[lane.count++][1];
        if (grown) {
          lane.text.appendData(grown);
          lane.answer.scrollTop = lane.answer.scrollHeight;
        }
        const done = lane.count === due.length;
        lane.answer.classList.toggle('done', done);
        if (now - lane.drawn >= FIGURES || (done && !lane.whole)) {
          figures(lane, due, lane.count);
          lane.drawn = now;
          lane.whole = done;
        }
        left ||= !done;
      }
      if (left) return void requestAnimationFrame(step);
      const finished = playing;
      setTimeout(() => {
        if (playing !== finished) return;
        clear();
        if (round + 1 < recorded.rounds.length) begin(recorded, round + 1, bar);
        else stop();
      }, ROUND_PAUSE);
    }

    function clear() {
      for (const lane of playing?.lanes || []) { lane.answer.remove(); lane.cover.remove(); }
    }

    function stop() {
      clear();
      playing?.bar.remove();
      document.body.classList.remove('opening-playing');
      playing = null;
      wanted = false;
    }

    let wanted = !matchMedia('(prefers-reduced-motion: reduce)').matches
      && !new URLSearchParams(location.search).has('run');

    async function open() {
      if (!wanted) return;
      const answer = await fetch('opening.json');
      const recorded = answer.ok ? await answer.json() : null;
      if (!recorded || !wanted) return;
      const asked = performance.now();
      const ready = setInterval(() => {
        if (!wanted) return clearInterval(ready);
        const progress = document.getElementById('baseline-progress');
        const run = document.getElementById('baseline-run');
        // Gradio writes a lane's tiles and its chat at different moments; both must be there, in every lane that is.
        const filled = Object.keys(recorded.rounds[0]).filter(name => document.querySelector(`#baseline-tiles-${name} .tiles`));
        const there = filled.length && filled.every(name => document.getElementById(`baseline-chat-${name}`));
        if (performance.now() - asked > PATIENCE) return clearInterval(ready);
        if (!progress || !run || run.disabled || !there) return;
        clearInterval(ready);
        const bar = element('div', 'opening-bar');
        const end = element('button', '', 'Stop the recording');
        end.type = 'button';
        end.addEventListener('click', stop);
        bar.append(element('span', '', recorded.label), end);
        progress.after(bar);
        document.body.classList.add('opening-playing');
        begin(recorded, 0, bar);
      }, 50);
    }

    // At once, before the server answers: somebody runs, replays or goes elsewhere.
    document.addEventListener('click', event => {
      if (event.target.closest?.('[id$="-run"], [id$="-replay"], [role="tab"]')) stop();
    }, true);
    document.addEventListener('keydown', event => {
      if (event.key === 'Enter' && event.target.closest?.('[id$="-prompt"]')) stop();
    }, true);
    document.addEventListener('visibilitychange', () => { if (document.hidden) stop(); });
    window.addEventListener('pagehide', stop);
    open();
    return { stop, get playing() { return playing !== null; } };
  })();

  return { exportChart, race };
})();
