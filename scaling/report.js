// What the page does with a script: tables sort, figures download in their light colours, trials can be explored.
// Without one all figures and tables are there still. Nothing is loaded from anywhere.
'use strict';

const read = (id) => JSON.parse(document.getElementById(id).textContent);

// Sorting reads the full-precision value of a cell; empty cells always go last.
document.querySelectorAll('table.sortable').forEach((table) => {
  table.querySelectorAll('thead th').forEach((th, column) => {
    th.querySelector('button').addEventListener('click', () => {
      const up = th.getAttribute('aria-sort') !== 'ascending';
      table.querySelectorAll('th[aria-sort]').forEach((other) => other.removeAttribute('aria-sort'));
      th.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const body = table.tBodies[0], numeric = th.classList.contains('n');
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
      Array.from(body.rows).map((row) => [key(row), row]).sort(([a], [b]) => {
        if (a === '' || b === '') return (a === '') - (b === '');
        const order = numeric ? a - b : a.localeCompare(b, undefined, {numeric: true});
        return up ? order : -order;
      }).forEach(([, row]) => body.appendChild(row));
    });
  });
});

// The shown figure follows the theme; the downloaded one gets the light colours it was drawn with.
document.querySelectorAll('a[data-svg]').forEach((link) => {
  link.addEventListener('click', () => {
    const svg = link.closest('figure').querySelector('svg').cloneNode(true), box = svg.viewBox.baseVal;
    svg.setAttribute('width', box.width + 'pt');
    svg.setAttribute('height', box.height + 'pt');
    const colours = read('theme-colours');
    const text = new XMLSerializer().serializeToString(svg).replace(/var\(--(\w+)\)/g, (_, name) => colours[name]);
    link.href = URL.createObjectURL(new Blob([text], {type: 'image/svg+xml'}));
  });
});

// A number to read: five significant digits, powers of ten for the very large and small.
function shown(value) {
  if (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5)) return String(Number(value.toPrecision(5)));
  const [mantissa, exponent] = value.toExponential(4).split('e');
  const raised = String(Number(exponent)).replace(/./g, (sign) => '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'['0123456789-'.indexOf(sign)]);
  return (Number(mantissa) === 1 ? '' : Number(mantissa) + '×') + '10' + raised;
}

// Ticks of a logarithmic axis: powers of ten, at most `most` of them, or 1-2-5 steps over a short range.
function logTicks(low, high, most) {
  const first = Math.floor(Math.log10(low)), tens = [], fine = [];
  for (let e = first; e <= Math.log10(high); e++) {
    for (const step of [1, 2, 5]) {
      const value = Number(`${step}e${e}`);
      if (value >= low && value <= high) (step === 1 ? tens.push(value) : 0, fine.push(value));
    }
  }
  const ticks = tens.length >= 3 ? tens : fine;
  return ticks.filter((_, i) => i % Math.ceil(ticks.length / most) === 0);
}

// Ticks of a linear axis: about five, at multiples of 1, 2 or 5 times a power of ten.
function linearTicks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough * .7) * power, ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) ticks.push(Number((k * step).toPrecision(12)));
  return ticks;
}

// The outline of each marker that the figures use, for a radius of one.
const MARKERS = {
  o: 'M1 0A1 1 0 1 1 -1 0A1 1 0 1 1 1 0Z', s: 'M-.9 -.9H.9V.9H-.9Z', '^': 'M0 -1.1L1 .8H-1Z', v: 'M0 1.1L1 -.8H-1Z',
  D: 'M0 -1.2L1.2 0L0 1.2L-1.2 0Z', P: 'M-.4 -1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z',
  X: 'M0 -.5L.6 -1.1L1.1 -.6L.5 0L1.1 .6L.6 1.1L0 .5L-.6 1.1L-1.1 .6L-.5 0L-1.1 -.6L-.6 -1.1Z',
};

function element(parent, name, attributes, text) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

// A scatter of all trials: a metric against a size, families to switch off, the trial under the pointer in words.
function explore(root, data) {
  const find = (name) => root.querySelector(`[data-part=${name}]`);
  const chart = find('chart'), tip = find('tip'), legend = find('legend'), count = find('count');
  const place = find('section'), metric = find('metric'), axis = find('axis');
  const hidden = new Set();
  let marks = [], current = -1;

  const options = (select, names) => {
    const before = select.value;
    select.replaceChildren(...names.map(([value, text]) => new Option(text, value)));
    if (names.some(([value]) => value === before)) select.value = before;
  };
  const section = () => data.sections[Number(place.value) || 0];

  function enter() {
    options(metric, section().metrics);
    options(axis, section().axes);
    const present = new Set(section().trials.map((trial) => trial.family));
    legend.replaceChildren(...data.families.flatMap((family, index) => {
      if (!present.has(index)) return [];
      const button = document.createElement('button');
      button.type = 'button';
      button.setAttribute('aria-pressed', String(!hidden.has(index)));
      const icon = element(button, 'svg', {viewBox: '-8 -8 16 16', width: 16, height: 16, 'aria-hidden': 'true'});
      element(icon, 'path', {d: MARKERS[family.marker], transform: 'scale(5.5)', style: `fill:${family.colour}`});
      button.append(family.name);
      button.addEventListener('click', () => {
        hidden.has(index) ? hidden.delete(index) : hidden.add(index);
        button.setAttribute('aria-pressed', String(!hidden.has(index)));
        draw();
      });
      return [button];
    }));
    draw();
  }

  function draw() {
    const {trials, laws} = section(), [m, a] = [metric.value, axis.value];
    const own = trials.filter((t) => t.values[m] !== undefined && t.values[a] > 0);
    const seen = own.filter((t) => !hidden.has(t.family));
    const curves = laws.filter((law) => law.metric === m && law.x === a && !hidden.has(law.family));
    const left = trials.length - own.length;
    count.textContent = `${seen.length} of ${trials.length} trials shown` + (left ? `; ${left} without these values` : '');
    point(-1);
    chart.replaceChildren();
    marks = [];
    if (!seen.length) return;

    const width = Math.max(chart.parentNode.clientWidth, 240), height = Math.round(Math.min(460, Math.max(300, width * .6)));
    const edge = {left: 62, right: 12, top: 26, bottom: 44};
    chart.setAttribute('viewBox', `0 0 ${width} ${height}`);
    chart.setAttribute('height', height);
    const xs = seen.map((t) => t.values[a]), ys = seen.map((t) => t.values[m]);
    const low = Math.min(...xs) / 1.3, high = Math.max(...xs) * 1.3;
    const rest = (Math.max(...ys) - Math.min(...ys)) * .06 || Math.abs(ys[0]) * .01 || 1;
    const bottom = Math.min(...ys) - rest, top = Math.max(...ys) + rest;
    const px = (x) => edge.left + (Math.log(x / low) / Math.log(high / low)) * (width - edge.left - edge.right);
    const py = (y) => edge.top + ((top - y) / (top - bottom)) * (height - edge.top - edge.bottom);

    for (const x of logTicks(low, high, Math.max(2, Math.floor(width / 80)))) {
      element(chart, 'line', {class: 'rule', x1: px(x), x2: px(x), y1: edge.top, y2: height - edge.bottom});
      element(chart, 'text', {x: px(x), y: height - edge.bottom + 17, 'text-anchor': 'middle'}, shown(x));
    }
    for (const y of linearTicks(bottom, top)) {
      element(chart, 'line', {class: 'rule', x1: edge.left, x2: width - edge.right, y1: py(y), y2: py(y)});
      element(chart, 'text', {x: edge.left - 7, y: py(y) + 4, 'text-anchor': 'end'}, shown(y));
    }
    element(chart, 'text', {x: edge.left, y: 14}, metric.selectedOptions[0].text);
    element(chart, 'text', {x: width - edge.right, y: height - 6, 'text-anchor': 'end'}, axis.selectedOptions[0].text);
    for (const law of curves) {
      const path = law.points.filter(([x, y]) => x >= low && x <= high && y >= bottom && y <= top);
      const points = path.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(' ');
      element(chart, 'polyline', {points, class: 'law', style: `stroke:${data.families[law.family].colour}`});
    }
    marks = seen.map((trial) => ({trial, x: px(trial.values[a]), y: py(trial.values[m])}));
    marks.sort((one, other) => one.x - other.x || one.y - other.y);
    for (const mark of marks) {
      const family = data.families[mark.trial.family];
      const at = `translate(${mark.x.toFixed(1)} ${mark.y.toFixed(1)}) scale(4.5)`;
      mark.path = element(chart, 'path', {d: MARKERS[family.marker], transform: at, style: `fill:${family.colour}`});
    }
  }

  // Say which trial mark `index` is (-1: none) in the box beside it, which assistive technology reads out.
  function point(index) {
    if (current >= 0 && marks[current]) marks[current].path.classList.remove('chosen');
    current = index;
    tip.hidden = index < 0;
    if (index < 0) return;
    const {trial, x, y, path} = marks[index];
    path.classList.add('chosen');
    const values = [metric, axis].map((s) => `${s.selectedOptions[0].text}: ${shown(trial.values[s.value])}`);
    tip.textContent = [trial.about, ...values].join('\n');
    const room = chart.parentNode.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, x - tip.offsetWidth / 2))}px`;
    tip.style.top = `${y > tip.offsetHeight + 14 ? y - tip.offsetHeight - 12 : y + 14}px`;
  }

  // The trial nearest to the pointer or finger, if it is near.
  function near(event) {
    const box = chart.getBoundingClientRect(), [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = -1, least = event.pointerType === 'touch' ? 36 : 20;
    marks.forEach((mark, index) => {
      const distance = Math.hypot(mark.x - x, mark.y - y);
      if (distance < least) [best, least] = [index, distance];
    });
    if (best !== current) point(best);
  }
  chart.addEventListener('pointermove', (event) => { if (event.pointerType !== 'touch') near(event); });
  chart.addEventListener('pointerdown', near);
  chart.addEventListener('pointerleave', (event) => { if (event.pointerType !== 'touch') point(-1); });
  chart.addEventListener('keydown', (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (step && marks.length) {
      event.preventDefault();
      point(current < 0 && step < 0 ? marks.length - 1 : (current + step + marks.length) % marks.length);
    } else if (event.key === 'Escape') point(-1);
  });

  options(place, data.sections.map((one, index) => [String(index), one.name]));
  place.parentNode.hidden = data.sections.length < 2;
  place.addEventListener('change', enter);
  metric.addEventListener('change', draw);
  axis.addEventListener('change', draw);
  document.querySelectorAll('[data-live]').forEach((part) => { part.hidden = false; });
  enter();
  let drawn = chart.parentNode.clientWidth;
  window.addEventListener('resize', () => {
    if (chart.parentNode.clientWidth !== drawn) { drawn = chart.parentNode.clientWidth; draw(); }
  });
}

if (document.getElementById('explore')) explore(document.getElementById('explore'), read('explore-data'));
