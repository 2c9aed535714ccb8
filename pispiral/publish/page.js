const dark = () => document.documentElement.dataset.theme === 'dark';
const MAP = {'#222222':'#dcdcdc','#e5e5e5':'#33383f','white':'#16181c','#555555':'#a9adb3','#000000':'#f2f2f2',
             '#f4f4f4':'#22262c'};
const light = v => MAP[v.toLowerCase()] || v.replace(/^rgba\(0, 0, 0,/, 'rgba(242, 242, 242,');
const paint = text => JSON.parse(text, (k, v) => dark() && typeof v === 'string' && isNaN(k) ? light(v) : v);
function draw() {
  for (const box of document.querySelectorAll('.draw')) {
    const fig = paint(document.getElementById(box.dataset.json).textContent);
    const own = fig.layout.width || 480, scale = Math.max(.7, Math.min(1, box.parentElement.clientWidth/own));
    Plotly.react(box, fig.data, fig.layout, {displaylogo: false, displayModeBar: false}).then(() => {
      box.style.transform = `scale(${scale})`;
      box.style.margin = `0 ${-own*(1 - scale)}px ${-box.offsetHeight*(1 - scale)}px 0`;
      box.dataset.drawn = '1';
    });
  }
}
function theme(name) { document.documentElement.dataset.theme = name; draw(); }
const system = matchMedia('(prefers-color-scheme: dark)');
theme(system.matches ? 'dark' : 'light');
system.addEventListener('change', e => theme(e.matches ? 'dark' : 'light'));
document.getElementById('theme').addEventListener('click', () => theme(dark() ? 'light' : 'dark'));
let wait; addEventListener('resize', () => { clearTimeout(wait); wait = setTimeout(draw, 150); });
function reveal() { const at = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (at && at.tagName === 'DETAILS') at.open = true; }
addEventListener('hashchange', reveal); reveal();
